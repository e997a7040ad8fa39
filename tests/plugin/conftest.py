"""Servers with the plug-in, one fleet at a time; without SGLang nothing here is collected."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest

from tests.conformance.sglang_fleet import RealServers, is_included
from tests.conformance.under_test import talking
from tests.plugin.ground import FLOOR_S, GROUNDS, RETRACTING, Ground, Trial, spec

collect_ignore_glob = [] if is_included() else ["test_*.py"]


class Fleets:
    """Keeps the last one: tests are ordered by the ground that they stand on."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._name = ""
        self._open = ExitStack()

    def get(self, name: str) -> RealServers:
        if name != self._name:
            self._open.close()
            logs = self._factory.mktemp(name.replace(" ", "-"))
            with pytest.MonkeyPatch.context() as patch:
                for key, value in RETRACTING.items():  # read where SGLang is imported
                    patch.setenv(key, value)
                self._servers = self._open.enter_context(RealServers(spec(name, logs)))
            self._name = name
        return self._servers

    def close(self) -> None:
        self._open.close()


@pytest.fixture(scope="session")
def fleets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleets]:
    fleets = Fleets(tmp_path_factory)
    try:
        yield fleets
    finally:
        fleets.close()


@pytest.fixture(scope="session", params=GROUNDS)
def ground(request: pytest.FixtureRequest, fleets: Fleets) -> Ground:
    return Ground(request.param, fleets.get(GROUNDS[request.param][0]))


@pytest.fixture
async def trial(ground: Ground, request: pytest.FixtureRequest) -> AsyncIterator[Trial]:
    """Whatever a test has set, slowed or paused is as before after it."""
    async with talking(ground, zlib.crc32(request.node.nodeid.encode())) as client:
        trial = Trial(ground, client)
        await trial.slow(FLOOR_S)
        try:
            yield trial
        finally:
            for url in {ground.url, ground.prefill}:
                await client.slow(url, None)
                await client.post(url + "/continue_generation", {})
                rest = {"tpot_us": 0, "displace": 1, "most_parked_us": 2e6, "hold_steps": 4}
                line = {"base_us": 0, "request_us": 0, "token_us": 0, "lease_s": 0, "reset": 1}
                await trial.set("all", url, **rest, **line)
