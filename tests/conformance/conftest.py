"""Every test here runs against each fleet there is: the emulator, and SGLang where it is installed.

The event loop chooses the fleet: virtual time for the emulator, the wall clock for real servers.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from backends.emulator.fleet import EmulatedFleet
from tests.conformance.emulated_fleet import Emulated, specs
from tests.conformance.sglang_fleet import is_included
from tests.conformance.under_test import Client, FleetUnderTest, talking
from tests.virtual_loop import VirtualTimeLoop

REAL_TIMEOUT_S = 240
"""The first real test pays for the fleet's start."""


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    emulator = {"emulator": VirtualTimeLoop}
    return {**emulator, "sglang": uvloop.new_event_loop} if is_included() else emulator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "sglang" in item.name.rpartition("[")[2].rstrip("]").split("-"):
            item.add_marker(pytest.mark.real_time)
            item.add_marker(pytest.mark.timeout(REAL_TIMEOUT_S))


@pytest.fixture
async def fleet(request: pytest.FixtureRequest) -> AsyncIterator[FleetUnderTest]:
    if isinstance(asyncio.get_running_loop(), VirtualTimeLoop):
        async with EmulatedFleet(specs()) as fleet:
            yield Emulated(fleet)
        return
    real: FleetUnderTest = request.getfixturevalue("real_fleet")
    yield real


@pytest.fixture
async def client(fleet: FleetUnderTest, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    async with talking(fleet, zlib.crc32(request.node.nodeid.encode())) as client:
        yield client
