"""Servers with the plug-in, started once; without SGLang nothing here is collected."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest

from tests.conformance.sglang_fleet import RealServers, is_included
from tests.conformance.under_test import talking
from tests.plugin.ground import FLOOR_S, GROUNDS, RETRACTING, Ground, Trial, spec

collect_ignore_glob = [] if is_included() else ["test_*.py"]


@pytest.fixture(scope="session")
def plugin_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServers]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for key, value in RETRACTING.items():  # read where SGLang is imported
                patch.setenv(key, value)
            servers = stack.enter_context(RealServers(spec(tmp_path_factory.mktemp("plugin"))))
        yield servers


@pytest.fixture(scope="session", params=GROUNDS)
def ground(request: pytest.FixtureRequest, plugin_fleet: RealServers) -> Ground:
    return Ground(request.param, plugin_fleet)


@pytest.fixture
async def trial(ground: Ground, request: pytest.FixtureRequest) -> AsyncIterator[Trial]:
    """Whatever a test has set, slowed or paused is as before after it."""
    async with talking(ground, zlib.crc32(request.node.nodeid.encode())) as client:
        trial = Trial(ground, client)
        await trial.slow(FLOOR_S)
        await trial.set(url=ground.prefill, displace=1)
        try:
            yield trial
        finally:
            for url in {ground.url, ground.prefill}:
                await client.slow(url, None)
                await client.post(url + "/continue_generation", {})
                rest = {"tpot_us": 0, "displace": 1, "most_parked_us": 2e6, "hold_steps": 4}
                line = {"base_us": 0, "request_us": 0, "token_us": 0, "lease_s": 0, "reset": 1}
                await trial.set("all", url, **rest, **line)
