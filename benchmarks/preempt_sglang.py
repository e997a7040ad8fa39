"""Preemptions on real SGLang servers: how soon a slot is free, and what online work notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import median

import aiohttp

from backends.fleet.fleet import Fleet
from backends.fleet.spec import FleetSpec, Group
from benchmarks.sglang_levers import CHUNK_TOKENS, KV_TOKENS
from gateway.app import Gateway
from gateway.clock import LiveClock
from gateway.config import Classes, Config, Online, Server, Telemetry, WorkerEntry
from policies.events import Recall
from policies.types import Pool, Role
from tests.conformance.under_test import Client, Leg, is_idle

STEP_S = 0.05
"""The floor of a decode step while slots and paces are measured."""
OFFLINE = {"x-slackwater-class": "offline"}
LONG_CHUNKS = 5
SHORT_TOKENS = 200
CHAT_TOKENS = 60
OFFLINE_CLIENTS = 4
PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    preemptions: int
    prompts: int
    chats: int


FULL, QUICK = (
    Effort(preemptions=150, prompts=15, chats=8),
    Effort(preemptions=8, prompts=3, chats=1),
)


@dataclass(slots=True)
class Found:
    step_s: float = STEP_S
    freed_s: list[float] = field(default_factory=list)
    resumed_s: list[float] = field(default_factory=list)
    chunk_s: list[float] = field(default_factory=list)
    idle_s: list[float] = field(default_factory=list)
    behind_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    beside_s: list[float] = field(default_factory=list)
    left: int = 0
    broken: int = 0


class Servers:
    """The fleet as the conformance suite's client addresses one; it has no unified server."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.prefill, self.decode, self.relaxed = (s.url for s in fleet.servers)
        self.unified = self.relaxed

    @property
    def urls(self) -> tuple[str, ...]:
        return self.prefill, self.decode, self.relaxed

    def bootstrap_port(self, url: str) -> int:
        port = next(s.bootstrap_port for s in self._fleet.servers if s.url == url)
        return port or 0

    async def kill(self, url: str) -> None:
        raise NotImplementedError

    async def start(self, url: str) -> None:
        raise NotImplementedError


@dataclass(slots=True)
class Bench:
    gateway: Gateway
    client: Client
    servers: Servers
    found: Found
    random: Random

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # noqa: ASYNC110 - a state is looked at
                await asyncio.sleep(0.002)

    async def slowed(self, step_s: float | None) -> None:
        for url in (self.servers.decode, self.servers.relaxed):
            await self.client.slow(url, step_s)

    def tokens(self) -> int:
        return sum(attempt.tokens for attempt in self.gateway.backend._live.values())

    def hold(self, *, held: bool) -> None:
        """Nothing is sent, so that a freed slot stays free."""
        for ledger in self.gateway.core.ledgers.values():
            ledger.draining = held

    # A slot.

    async def preempt(self) -> None:
        leg = self.client.generate(self.url, self.client.prompt(30), 40, headers=OFFLINE)
        await self.until(lambda: self.tokens() >= 2)
        self.hold(held=True)
        # A report lags behind what runs: one that does not tell of the slot cannot tell it is free.
        await self.client.until(self.servers.relaxed, lambda load: load["num_running_reqs"])
        await asyncio.sleep(self.random.uniform(0, self.found.step_s))  # anywhere in a step
        (job_id,) = self.gateway.backend._live
        seen, began_s = len(leg.chunks), time.perf_counter()
        self.gateway.driver.post(Recall(job_id))
        await self.client.until(
            self.servers.relaxed, lambda load: not load["num_running_reqs"], every_s=0.002
        )
        self.found.freed_s.append(time.perf_counter() - began_s)
        self.hold(held=False)
        began_s = time.perf_counter()
        self.gateway.driver.post(Recall(job_id))  # of one that waits: the core looks again
        await self.until(lambda: len(leg.chunks) > seen)
        self.found.resumed_s.append(time.perf_counter() - began_s)
        await self.client.slow(self.servers.relaxed, None)
        await self.ended(leg, 40)
        await self.client.slow(self.servers.relaxed, STEP_S)

    async def ended(self, leg: Leg, tokens: int) -> None:
        await leg.task
        self.found.broken += leg.status != 200 or len(leg.ids) != tokens

    # A prompt.

    async def first_token_s(self, tokens: int) -> float:
        began_s = time.perf_counter()
        leg = self.client.generate(self.url, self.client.prompt(tokens), 4)
        await leg.begun.wait()
        took_s = time.perf_counter() - began_s
        await self.ended(leg, 4)
        return took_s

    async def prompt(self) -> None:
        chunk_s = await self.first_token_s(CHUNK_TOKENS)
        self.found.chunk_s.append(chunk_s)
        self.found.idle_s.append(await self.first_token_s(SHORT_TOKENS))
        ids = self.client.prompt(LONG_CHUNKS * CHUNK_TOKENS)
        long = self.client.generate(self.url, ids, 8, headers=OFFLINE)
        busy = next(e for e in self.gateway.core.ledgers.values() if e.worker.role is Role.PREFILL)
        await self.until(lambda: busy.offline.prefills)
        await asyncio.sleep(self.random.uniform(0, 2) * median(self.found.chunk_s))
        self.found.behind_s.append(await self.first_token_s(SHORT_TOKENS))
        await self.ended(long, 8)

    # A chat.

    async def gaps_s(self) -> list[float]:
        said = [{"role": "user", "content": f"Tell me of {self.random.random()}"}]
        sampling = {"max_tokens": CHAT_TOKENS, "temperature": 0, "ignore_eos": True}
        body = {"model": "tiny", "messages": said, "stream": True, **sampling}
        async with self.client.http.post(self.url + "/v1/chat/completions", json=body) as answer:
            times = [
                time.perf_counter() async for line in answer.content if line.startswith(b"data: {")
            ]
        # The role comes with the first token, the end with the last one.
        return [after - before for before, after in pairwise(times[1:-1])]

    async def chat(self) -> None:
        self.found.alone_s += await self.gaps_s()
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(OFFLINE_CLIENTS):
                group.create_task(self.offline_until(over))
            await self.until(lambda: self.tokens() > OFFLINE_CLIENTS)
            self.found.beside_s += await self.gaps_s()
            over.set()

    async def offline_until(self, over: asyncio.Event) -> None:
        while not over.is_set():
            leg = self.client.generate(self.url, self.client.prompt(300), 30, headers=OFFLINE)
            await self.ended(leg, 30)

    # The end.

    async def leftovers(self) -> int:
        """After at most as long as servers take to notice."""
        for url in self.servers.urls:
            await self.client.until(url, is_idle)
        loads = [await self.client.loads(url) for url in self.servers.urls]
        held: int = sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
        return held + len(self.gateway.core) + len(self.gateway.backend)


def config_of(servers: Servers) -> Config:
    known = (
        ("prefill", servers.prefill, Role.PREFILL, Pool.RELAXED),
        ("strict", servers.decode, Role.DECODE, Pool.STRICT),
        ("relaxed", servers.relaxed, Role.DECODE, Pool.RELAXED),
    )
    entries = tuple(
        WorkerEntry(
            name=name, url=url, role=role, pool=pool, bootstrap_port=servers.bootstrap_port(url)
        )
        for name, url, role, pool in known
    )
    return Config(
        server=Server(port=0),
        classes=Classes(online=Online(ttft_ms=400.0)),
        telemetry=Telemetry(poll_ms=100.0),
        worker=entries,
    )


@asynccontextmanager
async def standing() -> AsyncIterator[tuple[Gateway, Client, Servers]]:
    spec = FleetSpec(
        model="tiny",
        kv_tokens=KV_TOKENS,
        servers=(
            Group(role=Role.PREFILL, flags=("--chunked-prefill-size", str(CHUNK_TOKENS))),
            Group(role=Role.DECODE, pool=Pool.STRICT),
            Group(role=Role.DECODE),
        ),
    )
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with Fleet(spec) as fleet, aiohttp.ClientSession(connector=connector) as http:
        servers = Servers(fleet)
        clock = LiveClock(asyncio.get_running_loop())
        async with asyncio.TaskGroup() as tasks:
            gateway = Gateway(config_of(servers), clock, Random(1), tasks, lambda line: None)
            try:
                await gateway.start()
                yield gateway, Client(http, servers, seed=1), servers
            finally:
                await gateway.close()


async def measure(effort: Effort) -> Found:
    async with standing() as (gateway, client, servers):
        bench = Bench(gateway, client, servers, Found(), Random(2))
        await bench.until(lambda: all(e.up for e in gateway.core.ledgers.values()))
        await bench.first_token_s(50)
        for _ in range(effort.prompts):
            await bench.prompt()
        await bench.slowed(STEP_S)
        bench.found.step_s = await client.step_s(bench.url)
        for _ in range(effort.preemptions):
            await bench.preempt()
        for _ in range(effort.chats):
            await bench.chat()
        await bench.slowed(None)
        bench.found.left = await bench.leftovers()
        return bench.found
