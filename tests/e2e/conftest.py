"""The gateway over real SGLang; without it, nothing here is collected, and pytest says so."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

import pytest

from tests.conformance.sglang_fleet import SGLangFleet, is_included
from tests.conformance.under_test import Client, talking

collect_ignore_glob = [] if is_included() else ["test_*.py"]


@pytest.fixture
async def client(real_fleet: SGLangFleet, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    """Whatever a test has slowed or paused runs again after it."""
    fleet = real_fleet
    async with talking(fleet, zlib.crc32(request.node.nodeid.encode())) as client:
        try:
            yield client
        finally:
            for url in (fleet.prefill, fleet.decode, fleet.relaxed, fleet.unified):
                await client.slow(url, None)
                await client.post(url + "/continue_generation", {})
