from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from policies.types import Role

SPECS = [
    ServerSpec(engine=EngineConfig(name="p", role=Role.PREFILL)),
    ServerSpec(engine=EngineConfig(name="d", role=Role.DECODE)),
    ServerSpec(engine=EngineConfig(name="u")),
    ServerSpec(engine=EngineConfig(name="i"), incremental=True),
]


@pytest.fixture
async def fleet() -> AsyncIterator[EmulatedFleet]:
    async with EmulatedFleet(SPECS) as fleet:
        yield fleet


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session
