"""The emulated fleet under test, with the shape that the real one has."""

from __future__ import annotations

from backends.emulator.fleet import EmulatedFleet, EmulatedServer, ServerSpec
from backends.engine import EngineConfig
from backends.steptimes import LinearStepTimes
from policies.types import Pool, Role
from tests.conformance.under_test import (
    CHUNK_TOKENS,
    CONTEXT_TOKENS,
    HEARTBEAT_S,
    KV_TOKENS,
    MISSED_HEARTBEATS,
    RELAXED_RUNNING,
    RENDEZVOUS_TIMEOUT_S,
    UNIFIED_QUEUED,
    UNIFIED_RUNNING,
)

TIMES = LinearStepTimes(
    prefill_floor_s=4e-3,
    prefill_base_s=1e-3,
    prefill_token_s=90e-6,
    prefill_pair_s=7e-9,
    decode_base_s=3.5e-3,
    decode_sequence_s=0.2e-3,
    decode_context_token_s=20e-9,
)
"""Roughly the tiny model's on two CPU cores."""


def config(
    name: str, role: Role, *, max_running: int = 32, max_queued: int | None = None
) -> EngineConfig:
    return EngineConfig(
        name=name,
        role=role,
        model="tiny",
        kv_tokens=KV_TOKENS,
        max_running=max_running,
        max_queued=max_queued,
        chunk_tokens=CHUNK_TOKENS,
        context_tokens=CONTEXT_TOKENS,
        priority=True,
        bootstrap_timeout_s=RENDEZVOUS_TIMEOUT_S,
        waiting_timeout_s=RENDEZVOUS_TIMEOUT_S,
        heartbeat_s=MISSED_HEARTBEATS * HEARTBEAT_S,
        role_switch=role is not Role.UNIFIED,
    )


def specs() -> list[ServerSpec]:
    unified = config(
        "unified", Role.UNIFIED, max_running=UNIFIED_RUNNING, max_queued=UNIFIED_QUEUED
    )
    relaxed = config("relaxed", Role.DECODE, max_running=RELAXED_RUNNING)
    return [
        ServerSpec(engine=config("prefill", Role.PREFILL), times=TIMES, pool=Pool.RELAXED),
        ServerSpec(engine=config("decode", Role.DECODE), times=TIMES),
        ServerSpec(engine=relaxed, times=TIMES, pool=Pool.RELAXED, incremental=True),
        ServerSpec(engine=unified, times=TIMES, pool=Pool.RELAXED),
    ]


class Emulated:
    """An open EmulatedFleet, addressed as the suite addresses one."""

    def __init__(self, fleet: EmulatedFleet) -> None:
        self._fleet = fleet
        self.prefill, self.decode = fleet["prefill"].url, fleet["decode"].url
        self.relaxed, self.unified = fleet["relaxed"].url, fleet["unified"].url

    def _server(self, url: str) -> EmulatedServer:
        return next(server for server in self._fleet.servers.values() if server.url == url)

    def bootstrap_port(self, url: str) -> int:
        return self._server(url).bootstrap_port

    async def kill(self, url: str) -> None:
        await self._server(url).kill()

    async def start(self, url: str) -> None:
        await self._server(url).restart()
