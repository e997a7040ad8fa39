"""`python -m benchmarks.batch`: what a large batch costs, and what online requests notice of it.

Ingestion of 50,000 rows, listing and status with a million rows stored, time to first token while
a 200 MB file uploads and a batch drains, and a batch's throughput beside raw offline requests.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks import batch_online
from benchmarks.batch_load import OFFLINE, bodies_of
from benchmarks.batch_site import (
    CHAT,
    apart,
    becomes,
    chats,
    few_servers,
    quantile,
    submitted,
    write_rows,
)
from benchmarks.processes import Watch, kib
from benchmarks.report import Check, Goal, Report, Spread, add_report_options
from gateway.batch.client import BatchClient
from gateway.batch.objects import NewBatch, NewRow, Purpose, Quota, Stage, StoredFile
from gateway.batch.store import Store

HOUR_US = 3_600_000_000
PLENTY = Quota(stored_bytes=10**15, open_batches=10**9, open_rows=10**12)

INGEST_S, INGEST_MB = 20.0, 300.0
ANSWER_MS = 10.0
THROUGHPUT_SHARE = 0.95
OFFLINE_SEATS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    rows: int = 50_000
    stored_rows: int = 1_000_000
    upload_mb: int = 200
    phase_s: float = 12.0
    rounds: int = 4
    offline_rows: int = 1500
    repeats: int = 2
    looks: int = 300


QUICK = Size(
    rows=5_000,
    stored_rows=50_000,
    upload_mb=20,
    phase_s=3.0,
    rounds=1,
    offline_rows=200,
    repeats=1,
    looks=50,
)


@dataclass(slots=True)
class Bench:
    size: Size
    report: Report
    tick: Callable[[str], object]


# Ingestion.


async def ingestion(bench: Bench, folder: Path) -> None:
    """Nobody is there to run the rows: what is measured is their way into the database."""
    rows = bench.size.rows
    path = folder / "rows.jsonl"
    write_rows(path, rows, CHAT, chats(random.Random(1), 64))
    async with (
        apart(folder) as gateway,
        BatchClient.connected(gateway.url, "") as client,
    ):
        assert gateway.running is not None
        pid = gateway.running.pid
        began_s = time.monotonic()
        batch = await becomes(client, await submitted(client, path), ("in_progress", "failed"))
        took_s = time.monotonic() - began_s
        most_mb = kib(pid, "status", "VmHWM") * 1024 / 1e6
        assert batch["status"] == "in_progress", batch["errors"]
    size_mb = path.stat().st_size / 1e6
    for name, value, target, unit in (
        (f"{rows:,} rows uploaded and validated", took_s, INGEST_S, "s"),
        ("the gateway's memory meanwhile, at most", most_mb, INGEST_MB, "MB"),
    ):
        bench.report.checks.append(Check(name=name, value=value, target=target, unit=unit))
    bench.report.notes.append(f"{rows:,} rows are {size_mb:.0f} MB; no server runs them meanwhile")


# A million rows.


async def stored(bench: Bench, folder: Path) -> None:
    rows, each = bench.size.stored_rows, min(50_000, bench.size.stored_rows)
    began_s = time.monotonic()
    await _fill(folder / "batches", rows // each, each)
    filled_s = time.monotonic() - began_s
    async with (
        apart(folder) as gateway,
        BatchClient.connected(gateway.url, "") as client,
    ):
        page = await client.page(100, None)
        ids = [batch["id"] for batch in page["data"]]
        rng = random.Random(3)
        for name, ask in {
            "status of a batch": lambda: client.batch(rng.choice(ids)),
            "list of batches": lambda: client.page(20, None),
        }.items():
            times_ms = [await _timed_ms(ask) for _ in range(bench.size.looks)]
            bench.report.spread[f"{name}, ms"] = Spread.of(times_ms)
            bench.report.checks.append(
                Check(
                    name=f"{name} with {rows:,} rows stored, median",
                    value=quantile(times_ms, 0.5),
                    target=ANSWER_MS,
                    unit="ms",
                )
            )
    bench.report.notes.append(f"{rows:,} rows were stored in {filled_s:.0f} s")


async def _fill(folder: Path, batches: int, rows: int) -> None:
    """Straight into the database, by the store itself."""
    (folder / "files").mkdir(parents=True)
    store = await Store.open(
        f"sqlite+aiosqlite:///{folder / 'batches.sqlite'}",
        owner="benchmark",
        now_us=_unix_us,
        lease_us=HOUR_US,
        alone=True,
    )
    await store.join()
    for number in range(batches):
        await store.announce(f"blob-{number}")
        await store.add_file(_file(number, rows), PLENTY)
        await store.add_batch(_batch(number), PLENTY)
        task = await store.take(Stage.VALIDATE)
        assert task is not None
        for first in range(0, rows, 5_000):
            await store.add_rows(task, [_row(n) for n in range(first, min(rows, first + 5_000))])
        await store.begin(task, model="emulated", total=rows)
    await store.leave()
    await store.close()


def _unix_us() -> int:
    return time.time_ns() // 1_000


def _file(number: int, rows: int) -> StoredFile:
    return StoredFile(
        id=f"file-{number}", tenant="", name="rows.jsonl", purpose=Purpose.INPUT,
        size_bytes=rows * 200, lines=rows, blob=f"blob-{number}", created_us=_unix_us(),
    )  # fmt: skip


def _batch(number: int) -> NewBatch:
    return NewBatch(
        id=f"batch_{number}", tenant="", endpoint=CHAT, window="24h", window_us=24 * HOUR_US,
        input_file_id=f"file-{number}", metadata={},
    )  # fmt: skip


def _row(number: int) -> NewRow:
    return NewRow(
        number=number + 1, custom_id=f"row-{number}", offset=200 * number, length=199, rank=number
    )


async def _timed_ms(ask: Callable[[], Awaitable[Any]]) -> float:
    began_s = time.perf_counter()
    await ask()
    return (time.perf_counter() - began_s) * 1e3


async def online(bench: Bench, folder: Path) -> None:
    """Servers and clients are elsewhere: the gateway has a core for itself."""
    await _online(bench, folder, pinned=True)


async def crowded(bench: Bench, folder: Path) -> None:
    """The emulated servers and the clients compete with the gateway for the cores."""
    await _online(bench, folder, pinned=False)


async def _online(bench: Bench, folder: Path, *, pinned: bool) -> None:
    size = bench.size
    await batch_online.measure(
        bench.report,
        folder,
        rounds=size.rounds,
        phase_s=size.phase_s,
        upload_mb=size.upload_mb,
        pinned=pinned,
    )


# A batch beside raw requests.


async def throughput(bench: Bench, folder: Path) -> None:
    """The same bodies as offline requests that are all there at once, and as a batch, in turns."""
    rows = bench.size.offline_rows
    path = folder / "rows.jsonl"
    write_rows(path, rows, CHAT, chats(random.Random(6), 100, words=20))
    raw_s: list[float] = []
    batch_s: list[float] = []
    async with (
        apart(folder, servers=few_servers(OFFLINE_SEATS)) as gateway,
        BatchClient.connected(gateway.url, "") as client,
    ):
        await _raw(gateway.url, bodies_of(path)[:20])
        for _ in range(bench.size.repeats):
            raw_s.append(await _raw(gateway.url, bodies_of(path)))
            batch_s.append(await _as_batch(client, path, rows))
    bench.report.checks.append(
        Check(
            name="throughput of a batch over that of raw offline requests",
            value=sum(raw_s) / sum(batch_s),
            target=THROUGHPUT_SHARE,
            unit="x",
            goal=Goal.AT_LEAST,
        )
    )
    for name, seconds in (("requests", raw_s), ("a batch", batch_s)):
        bench.report.spread[f"{rows:,} rows of 100 tokens as {name}, s"] = Spread.of(seconds)


async def _as_batch(client: BatchClient, path: Path, rows: int) -> float:
    began = await becomes(client, await submitted(client, path), ("in_progress", "completed"))
    began_s = time.monotonic()
    ended = await becomes(client, began["id"], ("finalizing", "completed"))
    assert ended["request_counts"]["completed"] == rows, ended
    return time.monotonic() - began_s


async def _raw(url: str, bodies: Sequence[dict[str, Any]]) -> float:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:

        async def one(body: dict[str, Any]) -> None:
            async with http.post(url + CHAT, json=body, headers=OFFLINE) as response:
                assert response.status == 200, await response.text()
                await response.read()

        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for body in bodies:
                group.create_task(one(body))
        return time.monotonic() - began_s


# All of it.

PARTS: dict[str, Callable[[Bench, Path], Awaitable[None]]] = {
    "ingestion": ingestion,
    "stored": stored,
    "online": online,
    "crowded": crowded,
    "throughput": throughput,
}


NOT_QUICK = frozenset({"crowded"})


async def measure(bench: Bench, names: Sequence[str]) -> None:
    for name in names:
        with tempfile.TemporaryDirectory(prefix="slackwater-batch-") as folder:
            await PARTS[name](bench, Path(folder))
        bench.tick(name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.batch", description=__doc__)
    add_report_options(parser)
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    given = parser.parse_args(arguments)
    names = [given.only] if given.only else [*PARTS]
    if given.quick and not given.only:
        names = [name for name in names if name not in NOT_QUICK]
    report = Report(title="the Batch API")
    watch = Watch.begin()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("parts", total=len(names))
        bench = Bench(QUICK if given.quick else Size(), report, lambda _: progress.advance(task))
        uvloop.run(measure(bench, names))
    report.notes.append(watch.note())
    if given.quick:
        report.notes.append(f"shortened: {QUICK}")
    return report.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
