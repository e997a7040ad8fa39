"""Every test here runs against each fleet there is: the emulator, and SGLang where it is installed.

The event loop chooses the fleet: virtual time for the emulator, the wall clock for real servers.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import aiohttp
import pytest
import uvloop

from backends.emulator.fleet import EmulatedFleet
from tests.conformance.emulated_fleet import Emulated, specs
from tests.conformance.sglang_fleet import SGLangFleet
from tests.conformance.under_test import Client, FleetUnderTest
from tests.virtual_loop import VirtualTimeLoop

LEFT_OUT = "left out: conformance on real SGLang, which is not installed (see docs/sglang.md)"
REAL_TIMEOUT_S = 240
"""The first real test pays for the fleet's start."""


def has_sglang() -> bool:
    named = os.environ.get("SLACKWATER_SGLANG_PYTHON")
    return bool(named) or importlib.util.find_spec("sglang") is not None


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    emulator = {"emulator": VirtualTimeLoop}
    return {**emulator, "sglang": uvloop.new_event_loop} if is_included() else emulator


def is_included() -> bool:
    return has_sglang() or os.environ.get("SLACKWATER_REQUIRE_SGLANG") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "sglang" in item.name.rpartition("[")[2].rstrip("]").split("-"):
            item.add_marker(pytest.mark.real_time)
            item.add_marker(pytest.mark.timeout(REAL_TIMEOUT_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not is_included():
        terminalreporter.write_line(LEFT_OUT)


@pytest.fixture(scope="session")
def real_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetUnderTest]:
    with SGLangFleet(tmp_path_factory.mktemp("sglang")) as fleet:
        yield fleet


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
    """Draws its prompts from the test's own seed, so that no test finds another's in a cache."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        client = Client(http, fleet, zlib.crc32(request.node.nodeid.encode()))
        try:
            yield client
        finally:
            await client.close()
            for url in (fleet.prefill, fleet.decode, fleet.relaxed, fleet.unified):
                await client.idle(url)
