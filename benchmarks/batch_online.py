"""What online requests notice of files and batches, beside being alone and beside plain offline
requests: each round, all of these see the same arrivals."""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.table import Table

from benchmarks.batch_site import (
    CHAT,
    ROOT,
    GatewayProcess,
    all_cancelled,
    apart,
    becomes,
    chats,
    few_servers,
    quantile,
    submitted,
    write_rows,
)
from benchmarks.processes import Running, all_stopped, cpu_s, start
from benchmarks.report import Check, Report, Spread, number
from gateway.batch.client import BatchClient

TTFT_SHARE: Final = 1.10
PREFILL_SERVERS: Final = 3
ARRIVALS_PER_S: Final = 12.0
PINGS_PER_S: Final = 20.0
ANSWER_TOKENS, PROMPT_WORDS = 16, 1_000
OFFLINE_TOKENS, OFFLINE_WORDS = 200, 8
LARGE_WORDS: Final = 2_000
LARGE_ROWS_PER_MB: Final = 100
SEATS: Final = 16
_SETTLES_S: Final = 1.0
_CALM_CORES: Final = 0.05
_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Beside:
    """What goes on while online requests come."""

    name: str
    batch: bool = False
    load: str = ""
    """Of batch_load: a large file is uploaded, or submitted as a batch, too, again and again; or
    the rows are plain offline requests, as many at once as there are seats."""


ALONE: Final = Beside("alone")
OFFLINE: Final = Beside("beside offline requests", load="offline")
UPLOADS: Final = Beside("beside uploads", load="upload")
BOTH: Final = Beside("beside a batch and uploads", batch=True, load="submit")
AGAIN: Final = Beside("alone again")
ALL: Final = (ALONE, OFFLINE, UPLOADS, BOTH, AGAIN)
"""In this order, and in every second round the other way round: what drifts is nobody's."""


@dataclass(slots=True)
class Seen:
    ttft_ms: list[list[float]] = field(default_factory=list)
    """By round."""
    ping_ms: list[float] = field(default_factory=list)
    """Of answers that need no server: the gateway's own part."""
    gateway_cores: list[float] = field(default_factory=list)

    @property
    def all_ms(self) -> list[float]:
        return [each for of_round in self.ttft_ms for each in of_round]


@dataclass(slots=True)
class Scene:
    gateway: GatewayProcess
    client: BatchClient
    http: aiohttp.ClientSession
    rows: Path
    large: Path
    notes: list[str]

    @property
    def pid(self) -> int:
        assert self.gateway.running is not None
        return self.gateway.running.pid

    @asynccontextmanager
    async def with_(self, beside: Beside) -> AsyncIterator[None]:
        await self._calm()
        batch_id = ""
        if beside.batch:
            batch_id = await submitted(self.client, self.rows)
            await becomes(self.client, batch_id, ("in_progress",))
        with all_stopped() as loads:
            if beside.load:
                loads.append(self._load(beside.load))
                await asyncio.sleep(_SETTLES_S)
            yield
            took_s = loads[-1].last_words().split() if loads else []
        if took_s:
            mb = self.large.stat().st_size / 1e6
            self.notes.append(f"{beside.name}: {mb:.0f} MB took {', '.join(took_s)} s")
        if beside.batch:
            ran = await self.client.cancel(batch_id)
            ended = ran["request_counts"]["completed"]
            self.notes.append(f"{beside.name}: {ended:,} rows ended")
        await all_cancelled(self.client)

    async def _calm(self) -> None:
        """What an earlier phase has left to tidy up is not the next one's."""
        cores = 1.0
        while cores > _CALM_CORES:
            used_s = cpu_s(self.pid)
            await asyncio.sleep(_LOOK_S)
            cores = (cpu_s(self.pid) - used_s) / _LOOK_S

    def _load(self, what: str) -> Running:
        file = self.rows if what == OFFLINE.load else self.large
        command = [sys.executable, "-m", "benchmarks.batch_load", what, self.gateway.url]
        return start(what, [*command, str(file)], cwd=ROOT)


async def measure(
    report: Report, folder: Path, *, rounds: int, phase_s: float, upload_mb: int, pinned: bool
) -> None:
    """`pinned`: the gateway has a core for itself, and all else the others. One phase comes before
    all that count: from its first requests a gateway learns how fast its servers are."""
    rows, large = folder / "rows.jsonl", folder / "large.jsonl"
    write_rows(rows, 20_000, CHAT, chats(random.Random(2), OFFLINE_TOKENS, OFFLINE_WORDS))
    some = list(islice(chats(random.Random(4), 8, LARGE_WORDS), 100))
    write_rows(large, upload_mb * LARGE_ROWS_PER_MB, CHAT, cycle(some))
    seen = {beside: Seen() for beside in ALL}
    servers = few_servers(SEATS, prefill=PREFILL_SERVERS)
    async with (
        apart(folder, servers=servers, batch="max_window_s = 1e9", pinned=pinned) as gateway,
        BatchClient.connected(gateway.url, "") as client,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        scene = Scene(gateway, client, http, rows, large, report.notes)
        texts = random.Random(5)
        await _online(scene, phase_s, random.Random(0), texts)
        for number_of in range(rounds):
            for beside in ALL[:: -1 if number_of % 2 else 1]:
                async with scene.with_(beside):
                    await _phase(scene, seen[beside], phase_s, number_of, texts)
    _tell(report, seen, pinned=pinned)


async def _phase(
    scene: Scene, seen: Seen, phase_s: float, round_number: int, texts: random.Random
) -> None:
    began_s, used_s = time.monotonic(), cpu_s(scene.pid)
    arrivals, moments = random.Random(100 + round_number), random.Random(200 + round_number)
    async with asyncio.TaskGroup() as group:
        pings = group.create_task(_pings(scene, phase_s, moments))
        seen.ttft_ms.append(await _online(scene, phase_s, arrivals, texts))
    seen.ping_ms += pings.result()
    seen.gateway_cores.append((cpu_s(scene.pid) - used_s) / (time.monotonic() - began_s))


async def _online(
    scene: Scene, seconds: float, arrivals: random.Random, texts: random.Random
) -> list[float]:
    """Milliseconds to each first token."""
    found: list[float] = []
    bodies = chats(texts, ANSWER_TOKENS, PROMPT_WORDS)

    async def one() -> None:
        body = next(bodies) | {"stream": True}
        began_s = time.perf_counter()
        async with scene.http.post(scene.gateway.url + CHAT, json=body) as response:
            assert response.status == 200, await response.text()
            await response.content.readany()
            found.append((time.perf_counter() - began_s) * 1e3)
            await response.read()

    await _at(_times_s(arrivals, seconds, ARRIVALS_PER_S), one)
    return found


async def _pings(scene: Scene, seconds: float, moments: random.Random) -> list[float]:
    found: list[float] = []

    async def one() -> None:
        began_s = time.perf_counter()
        async with scene.http.get(scene.gateway.url + "/health") as response:
            await response.read()
        found.append((time.perf_counter() - began_s) * 1e3)

    await _at(_times_s(moments, seconds, PINGS_PER_S), one)
    return found


async def _at(times_s: Iterable[float], do: Callable[[], Any]) -> None:
    """Whatever becomes of those before."""
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for due_s in times_s:
            await asyncio.sleep(max(0.0, began_s + due_s - time.monotonic()))
            group.create_task(do())


def _times_s(rng: random.Random, seconds: float, per_s: float) -> Sequence[float]:
    times_s: list[float] = []
    due_s = 0.0
    while (due_s := due_s + rng.expovariate(per_s)) < seconds:
        times_s.append(due_s)
    return times_s


def _tell(report: Report, seen: Mapping[Beside, Seen], *, pinned: bool) -> None:
    where = "the gateway has a core for itself" if pinned else "servers and clients on its cores"
    table = Table("online requests", title=f"time to first token, ms; {where}")
    for title in ("of them", "median", "p90", "p99", "most"):
        table.add_column(title, justify="right")
    for title in ("GET /health median", "p99", "gateway, cores"):
        table.add_column(title, justify="right")
    for beside, it in seen.items():
        figures = [number(quantile(it.all_ms, share)) for share in (0.5, 0.9, 0.99, 1.0)]
        pings = [number(quantile(it.ping_ms, share)) for share in (0.5, 0.99)]
        cores = number(statistics.mean(it.gateway_cores))
        table.add_row(beside.name, str(len(it.all_ms)), *figures, *pings, cores)
        report.spread[f"TTFT {beside.name}, ms; {where}"] = Spread.of(it.all_ms)
    report.tables.append(table)
    found = ratios(seen)
    for name, spread in found.by_round.items():
        report.spread[f"TTFT p99 {name}, by round; {where}"] = spread
    report.notes.append(f"online TTFT p99 alone again over alone: {found.same:.2f}; {where}")
    for name, value in found.checked.items():
        name = f"online TTFT p99 {name}; {where}"
        report.checks.append(Check(name=name, value=value, target=TTFT_SHARE, unit="x"))


@dataclass(frozen=True, slots=True)
class Ratios:
    """Of p99s over all rounds together: that of one round is its second or third largest."""

    checked: Mapping[str, float]
    same: float
    """Of one thing measured twice: what is nearer to 1 than this says nothing."""
    by_round: Mapping[str, Spread]


def ratios(seen: Mapping[Beside, Seen]) -> Ratios:
    alone = Seen([a + b for a, b in zip(seen[ALONE].ttft_ms, seen[AGAIN].ttft_ms, strict=True)])
    over = {ALONE.name: alone, OFFLINE.name: seen[OFFLINE]}
    return Ratios(
        checked={f"{BOTH.name}, over {name}": _ratio(seen[BOTH], it) for name, it in over.items()},
        same=_ratio(seen[AGAIN], seen[ALONE]),
        by_round={
            f"{BOTH.name} over alone": _spread(seen[BOTH], alone),
            f"{AGAIN.name} over alone": _spread(seen[AGAIN], seen[ALONE]),
        },
    )


def _ratio(one: Seen, other: Seen) -> float:
    return quantile(one.all_ms, 0.99) / quantile(other.all_ms, 0.99)


def _spread(one: Seen, other: Seen) -> Spread:
    pairs = zip(one.ttft_ms, other.ttft_ms, strict=True)
    return Spread.of(quantile(a, 0.99) / quantile(b, 0.99) for a, b in pairs)
