"""A gateway that runs batches over emulated servers, in real time: databases have threads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import orjson
from structlog.testing import capture_logs

from backends.emulator import EmulatedFleet, ServerSpec
from gateway.app import Gateway
from gateway.batch.client import BatchClient
from gateway.batch.settings import BatchSettings
from gateway.clock import LiveClock
from gateway.config import BreakerSettings, Config, Policies, Retry, Server, Telemetry
from policies.types import Role
from tests.gateway.gateway_under_test import entry_of, spec

FLEET = (
    spec("p1", Role.PREFILL, speed=20.0),
    spec("d1", Role.DECODE, speed=20.0),
    spec("u1", Role.UNIFIED, speed=20.0),
)
UNHURRIED = (spec("p1", Role.PREFILL, speed=20.0), spec("d1", Role.DECODE))
"""Long answers are far from their end when something happens, and cost little until then."""
OVER = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass
class Living:
    fleet: EmulatedFleet
    gateway: Gateway
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def over(self, batch_id: str, within_s: float = 20.0) -> dict[str, Any]:
        async with BatchClient.connected(self.url, "") as client, asyncio.timeout(within_s):
            while (batch := await client.batch(batch_id))["status"] not in OVER:  # noqa: ASYNC110 - a state
                await asyncio.sleep(0.05)
        return batch

    async def submit(self, rows: Sequence[dict[str, Any]], endpoint: str, window: str) -> str:
        path = self.folder / "rows.jsonl"
        path.write_bytes(lines(rows, endpoint))
        async with BatchClient.connected(self.url, "") as client:
            file = await client.upload(path, lambda _: None)
            batch = await client.create(file["id"], endpoint, window, {})
        return str(batch["id"])

    async def content(self, file_id: str) -> list[dict[str, Any]]:
        pieces: list[bytes] = []
        async with BatchClient.connected(self.url, "") as client:
            await client.download(file_id, pieces.append, lambda _: None)
        return [orjson.loads(line) for line in b"".join(pieces).splitlines()]


def lines(bodies: Sequence[dict[str, Any]], endpoint: str) -> bytes:
    return b"".join(
        orjson.dumps(
            {"custom_id": f"row-{number}", "method": "POST", "url": endpoint, "body": body}
        )
        + b"\n"
        for number, body in enumerate(bodies)
    )


@asynccontextmanager
async def emulated(specs: Sequence[ServerSpec] = FLEET) -> AsyncIterator[EmulatedFleet]:
    async with EmulatedFleet(specs, LiveClock(asyncio.get_running_loop())) as fleet:
        yield fleet


@asynccontextmanager
async def living(
    folder: Path, specs: Sequence[ServerSpec] = FLEET, **settings: Any
) -> AsyncIterator[Living]:
    async with emulated(specs) as fleet, before(fleet, folder, **settings) as it:
        yield it


@asynccontextmanager
async def before(fleet: EmulatedFleet, folder: Path, **settings: Any) -> AsyncIterator[Living]:
    """A gateway before these servers, which may outlive it."""
    clock = LiveClock(asyncio.get_running_loop())
    config = Config(
        server=Server(port=0, drain_s=5.0),
        policies=Policies(pools="none"),
        breaker=BreakerSettings(cooldown_ms=50.0, cooldown_max_ms=200.0),
        retry=Retry(backoff_ms=20.0),
        telemetry=Telemetry(poll_ms=100.0),
        batch=replace(BatchSettings(folder=str(folder / "batches")), **settings),
        worker=tuple(entry_of(server) for server in fleet.servers.values()),
    )
    with capture_logs() as told:
        async with asyncio.TaskGroup() as tasks:
            rng = random.Random(random.SystemRandom().getrandbits(64))
            gateway = Gateway(config, clock, rng, tasks, lambda fields: None)
            await gateway.start()
            try:
                yield Living(fleet, gateway, folder)
            finally:
                await gateway.drain()
                await gateway.close()
    assert [one for one in told if one["log_level"] == "error"] == []
