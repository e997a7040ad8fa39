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
    async with talking(real_fleet, zlib.crc32(request.node.nodeid.encode())) as client:
        yield client
