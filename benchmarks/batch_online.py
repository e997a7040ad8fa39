"""What online requests notice of files and batches, beside being alone and beside plain offline
requests: each round, all of these see the same arrivals."""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
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
    quantile,
    submitted,
    three_servers,
    write_rows,
)
from benchmarks.processes import Running, all_stopped, cpu_s, start
from benchmarks.report import Check, Report, Spread, number
from gateway.batch.client import BatchClient

TTFT_SHARE: Final = 1.10
ARRIVALS_PER_S: Final = 4.0
ANSWER_TOKENS, PROMPT_WORDS = 16, 1_000
OFFLINE_TOKENS, OFFLINE_WORDS = 200, 8
LARGE_WORDS: Final = 2_000
LARGE_ROWS_PER_MB: Final = 100
SEATS: Final = 16
_SETTLES_S: Final = 1.0
_WARM_S: Final = 3.0


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
ALL: Final = (ALONE, OFFLINE, UPLOADS, BOTH)


@dataclass(slots=True)
class Seen:
    ttft_ms: list[list[float]] = field(default_factory=list)
    """By round."""
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

    @asynccontextmanager
    async def with_(self, beside: Beside) -> AsyncIterator[None]:
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

    def _load(self, what: str) -> Running:
        file = self.rows if what == OFFLINE.load else self.large
        command = [sys.executable, "-m", "benchmarks.batch_load", what, self.gateway.url]
        return start(what, [*command, str(file)], cwd=ROOT)


async def measure(
    report: Report, folder: Path, *, rounds: int, phase_s: float, upload_mb: int
) -> None:
    rows, large = folder / "rows.jsonl", folder / "large.jsonl"
    write_rows(rows, 20_000, CHAT, chats(random.Random(2), OFFLINE_TOKENS, OFFLINE_WORDS))
    some = list(islice(chats(random.Random(4), 8, LARGE_WORDS), 100))
    write_rows(large, upload_mb * LARGE_ROWS_PER_MB, CHAT, cycle(some))
    seen = {beside: Seen() for beside in ALL}
    async with (
        apart(folder, servers=three_servers(SEATS), batch="max_window_s = 1e9") as gateway,
        BatchClient.connected(gateway.url, "") as client,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        scene = Scene(gateway, client, http, rows, large, report.notes)
        texts = random.Random(5)
        await _online(scene, _WARM_S, random.Random(0), texts)
        for number_of in range(rounds):
            for beside in ALL:
                async with scene.with_(beside):
                    await _phase(scene, seen[beside], phase_s, number_of, texts)
    _tell(report, seen)


async def _phase(
    scene: Scene, seen: Seen, phase_s: float, round_number: int, texts: random.Random
) -> None:
    assert scene.gateway.running is not None
    pid, began_s = scene.gateway.running.pid, time.monotonic()
    used_s = cpu_s(pid)
    arrivals = random.Random(100 + round_number)
    seen.ttft_ms.append(await _online(scene, phase_s, arrivals, texts))
    seen.gateway_cores.append((cpu_s(pid) - used_s) / (time.monotonic() - began_s))


async def _online(
    scene: Scene, seconds: float, arrivals: random.Random, texts: random.Random
) -> list[float]:
    """At random times, whatever becomes of those before; milliseconds to each first token."""
    found: list[float] = []

    async def one(body: dict[str, Any]) -> None:
        began_s = time.perf_counter()
        async with scene.http.post(scene.gateway.url + CHAT, json=body) as response:
            assert response.status == 200, await response.text()
            await response.content.readany()
            found.append((time.perf_counter() - began_s) * 1e3)
            await response.read()

    bodies = chats(texts, ANSWER_TOKENS, PROMPT_WORDS)
    times_s = _times_s(arrivals, seconds)
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for due_s in times_s:
            body = next(bodies) | {"stream": True}
            await asyncio.sleep(max(0.0, began_s + due_s - time.monotonic()))
            group.create_task(one(body))
    return found


def _times_s(arrivals: random.Random, seconds: float) -> Sequence[float]:
    times_s: list[float] = []
    due_s = 0.0
    while (due_s := due_s + arrivals.expovariate(ARRIVALS_PER_S)) < seconds:
        times_s.append(due_s)
    return times_s


def _tell(report: Report, seen: Mapping[Beside, Seen]) -> None:
    table = Table("online requests", title="time to first token, ms")
    for title in ("of them", "median", "p90", "p99", "most", "gateway, cores"):
        table.add_column(title, justify="right")
    for beside, it in seen.items():
        figures = [number(quantile(it.all_ms, share)) for share in (0.5, 0.9, 0.99, 1.0)]
        cores = number(statistics.mean(it.gateway_cores))
        table.add_row(beside.name, str(len(it.all_ms)), *figures, cores)
        report.spread[f"TTFT {beside.name}, ms"] = Spread.of(it.all_ms)
        p99s_ms = [quantile(each, 0.99) for each in it.ttft_ms]
        report.spread[f"TTFT {beside.name}, p99 by round, ms"] = Spread.of(p99s_ms)
    report.tables.append(table)
    p99_ms = quantile(seen[BOTH].all_ms, 0.99)
    for other in (ALONE, OFFLINE):
        report.checks.append(
            Check(
                name=f"online TTFT p99 {BOTH.name}, over {other.name}",
                value=p99_ms / quantile(seen[other].all_ms, 0.99),
                target=TTFT_SHARE,
                unit="x",
            )
        )
