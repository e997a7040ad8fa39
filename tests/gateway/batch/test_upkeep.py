"""From a file to rows, and from results to files, with the bytes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import orjson
import pytest

from gateway.batch.faults import Fenced, StorageUnavailable
from gateway.batch.files import Blobs, Folder
from gateway.batch.finalize import finalize
from gateway.batch.ingest import ingest
from gateway.batch.lines import answered
from gateway.batch.objects import Batch, Recorded, Result, Stage, Status, Task
from gateway.batch.store import Store
from gateway.batch.upkeep import Upkeep
from gateway.batch.validate import Limits
from gateway.clock import LiveClock
from tests.gateway.batch.conftest import Site
from tests.gateway.batch.served import jsonl, row
from tests.gateway.batch.stored import PLENTY, keep, new_batch, new_file, new_rows, result, taken

pytestmark = pytest.mark.real_time


@dataclass
class Works:
    site: Site
    store: Store
    blobs: Blobs
    folder: Path
    upkeep: Upkeep
    losses: list[int]
    """One for each time that rows were to be dropped."""

    async def submit(self, data: bytes, window_us: int = 10**12) -> Batch:
        file = replace(new_file(lines=data.count(b"\n")), size_bytes=len(data))
        (self.folder / file.blob).write_bytes(data)
        await keep(self.store, file)
        return await self.store.add_batch(new_batch(file, window_us=window_us), PLENTY)

    async def answer(self, room: int = 99, *, status: int = 200) -> int:
        rows = await self.store.claim(room)
        results = [
            Result(
                row=one,
                failed=status >= 400,
                line=answered(one, status=status, request_id="r", body=b'{"n":%d}' % one.number),
            )
            for one in rows
        ]
        return len(await self.store.finish(results))

    async def lines(self, file_id: str | None) -> list[dict[str, object]]:
        if file_id is None:
            return []
        file = await self.store.file("a", file_id)
        data = (self.folder / file.blob).read_bytes()
        assert (len(data), data.count(b"\n")) == (file.size_bytes, file.lines)
        return [orjson.loads(line) for line in data.splitlines()]

    def left(self) -> int:
        return len(list(self.folder.iterdir()))


@pytest.fixture
async def works(site: Site, store: Store, tmp_path: Path) -> AsyncIterator[Works]:
    folder = tmp_path / "files"
    blobs = Blobs(Folder(folder))
    numbers = count(1)
    losses: list[int] = []
    upkeep = Upkeep(
        store=store,
        blobs=blobs,
        clock=LiveClock(asyncio.get_running_loop()),
        now_us=lambda: site.now_us,
        new_id=lambda prefix: f"{prefix}made-{next(numbers)}",
        limits=Limits(max_rows=600),
        lease_lost=lambda: losses.append(1),
    )
    yield Works(site, store, blobs, folder, upkeep, losses)
    blobs.close()


async def test_a_file_goes_all_the_way(works: Works) -> None:
    """Lines of both files have the order of the input, whatever ended first."""
    made = await works.submit(jsonl(*(row(n) for n in range(1, 6))))
    assert await works.upkeep.work(Stage.VALIDATE)
    await works.answer(1)
    await works.answer(2, status=400)
    await works.answer(2)
    assert await works.upkeep.work(Stage.FINALIZE)
    ended = await works.store.batch("a", made.id)
    good, bad = await works.lines(ended.output_file_id), await works.lines(ended.error_file_id)
    assert [line["custom_id"] for line in good] == ["row-1", "row-4", "row-5"]
    assert [line["custom_id"] for line in bad] == ["row-2", "row-3"]
    assert good[0]["response"] == {"status_code": 200, "request_id": "r", "body": {"n": 1}}
    assert await works.upkeep.work(Stage.PURGE)
    assert not any([await works.upkeep.work(stage) for stage in Stage])


async def test_a_bad_file_fails_and_nothing_of_it_runs(works: Works) -> None:
    made = await works.submit(jsonl(row(1), row(1)) + b"x\n")
    await works.upkeep.work(Stage.VALIDATE)
    failed = await works.store.batch("a", made.id)
    assert failed.status is Status.FAILED
    assert [problem.line for problem in failed.problems] == [2, 3]
    assert await works.store.claim(9) == []


async def test_a_validation_that_was_killed_begins_anew(works: Works) -> None:
    """What it had stored already is in the way of nobody."""
    await works.submit(jsonl(*(row(n) for n in range(300))))
    task = await taken(works.store, Stage.VALIDATE)
    await works.store.add_rows(task, new_rows(40))
    await works.store.leave()
    await works.store.join()
    again = await ingest(
        works.store, works.blobs, await taken(works.store, Stage.VALIDATE), Limits()
    )
    assert (again.status, again.counts.total) == (Status.IN_PROGRESS, 300)
    assert len(await works.store.claim(999)) == 300


async def test_a_file_whose_bytes_are_gone_fails_its_batch(works: Works) -> None:
    made = await works.submit(jsonl(row(1)))
    (works.folder / made.input_blob).unlink()
    await works.upkeep.work(Stage.VALIDATE)
    failed = await works.store.batch("a", made.id)
    assert [problem.code for problem in failed.problems] == ["file_not_found"]


async def test_what_never_ran_is_told_as_expired(works: Works) -> None:
    made = await works.submit(jsonl(row(1), row(2), row(3)), window_us=5_000_000)
    await works.upkeep.work(Stage.VALIDATE)
    await works.answer(1)
    works.site.wait(5)
    await works.upkeep.chores()
    await works.upkeep.work(Stage.FINALIZE)
    ended = await works.store.batch("a", made.id)
    errors = await works.lines(ended.error_file_id)
    assert (ended.status, ended.counts.failed) == (Status.EXPIRED, 2)
    assert [line["custom_id"] for line in errors] == ["row-2", "row-3"]
    assert [line["error"]["code"] for line in errors] == ["batch_expired"] * 2  # type: ignore[index]
    assert len(await works.lines(ended.output_file_id)) == 1


async def test_a_batch_that_was_cancelled_early_has_no_files(works: Works) -> None:
    made = await works.submit(jsonl(row(1)))
    await works.store.cancel("a", made.id)
    await works.upkeep.work(Stage.FINALIZE)
    ended = await works.store.batch("a", made.id)
    assert ended.status is Status.CANCELLED
    assert (ended.output_file_id, ended.error_file_id) == (None, None)


async def test_files_of_a_finalising_that_was_killed_are_swept_up(works: Works) -> None:
    """It is done again under other names, and the batch has one set of files."""
    made = await works.submit(jsonl(row(1), row(2)))
    await works.upkeep.work(Stage.VALIDATE)
    await works.answer()
    await taken(works.store, Stage.FINALIZE)
    await works.store.announce("blob-of-the-dead")
    (works.folder / "blob-of-the-dead").write_bytes(b"half")
    again = await works.site.store(alone=True)
    task = await taken(again, Stage.FINALIZE)
    await finalize(again, works.blobs, task, works.upkeep.new_id, works.upkeep.now_us)
    await works.upkeep.sweep()
    ended = await again.batch("a", made.id)
    assert len(await works.lines(ended.output_file_id)) == 2
    assert works.left() == 2


async def test_a_finaliser_that_was_overtaken_leaves_nothing(works: Works) -> None:
    made = await works.submit(jsonl(row(1)))
    await works.upkeep.work(Stage.VALIDATE)
    await works.answer()
    stale = await taken(works.store, Stage.FINALIZE)
    await works.store.put_back(stale)
    await works.upkeep.work(Stage.FINALIZE)
    with pytest.raises(Fenced):
        await finalize(works.store, works.blobs, stale, works.upkeep.new_id, works.upkeep.now_us)
    await works.upkeep.sweep()
    ended = await works.store.batch("a", made.id)
    assert len(await works.lines(ended.output_file_id)) == 1
    assert works.left() == 2


async def test_a_file_that_gets_no_line_for_long_is_not_swept_up_meanwhile(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await works.submit(jsonl(*(row(n) for n in range(1, 7))))
    await works.upkeep.work(Stage.VALIDATE)
    await works.answer(1, status=400)
    await works.answer()
    recorded = works.store.recorded

    async def slow(task: Task, *, after: int, limit: int) -> list[Recorded]:
        works.site.wait(100)
        await works.store.renew()
        await works.upkeep.sweep()
        return await recorded(task, after=after, limit=1)

    monkeypatch.setattr(works.store, "recorded", slow)
    await works.upkeep.work(Stage.FINALIZE)
    ended = await works.store.batch("a", made.id)
    assert len(await works.lines(ended.error_file_id)) == 1
    assert len(await works.lines(ended.output_file_id)) == 5


async def test_output_files_expire_as_was_asked_for(works: Works) -> None:
    file = new_file(lines=1)
    (works.folder / file.blob).write_bytes(jsonl(row(1)))
    await keep(works.store, file)
    wanted = replace(new_batch(file), output_expires_s=3600)
    made = await works.store.add_batch(wanted, PLENTY)
    await works.upkeep.work(Stage.VALIDATE)
    await works.answer()
    await works.upkeep.work(Stage.FINALIZE)
    ended = await works.store.batch("a", made.id)
    assert ended.output_file_id
    output = await works.store.file("a", ended.output_file_id)
    assert output.expires_us == works.site.now_us + 3_600_000_000


async def test_a_lease_that_was_lost_is_told_of_and_a_new_one_taken(works: Works) -> None:
    other = await works.site.store()
    works.site.wait(11)
    await other.renew()
    await other.reap()
    await works.upkeep.renew()
    assert len(works.losses) == 1
    await works.upkeep.renew()
    assert len(works.losses) == 1


async def test_a_gateway_alone_keeps_its_rows_when_its_clock_is_set(works: Works) -> None:
    """Or when its machine has stood still: nobody else has looked meanwhile."""
    await works.submit(jsonl(row(1), row(2)))
    await works.upkeep.work(Stage.VALIDATE)
    held = await works.store.claim(2)
    works.site.wait(3_600)
    await works.upkeep.chores()
    assert await (await works.site.store()).reap() == 0
    assert (works.losses, len(await works.store.finish([result(one) for one in held]))) == ([], 2)


async def test_what_cannot_be_deleted_keeps_nothing_else_from_it(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.batch.upkeep._LITTER", 2)
    for name in ("a", "b", "c", "d", "e"):
        await works.store.announce(name)
        (works.folder / name).mkdir() if name in "ab" else (works.folder / name).touch()
    works.site.wait(301)
    for _ in range(4):
        with suppress(StorageUnavailable):
            await works.upkeep.sweep()
    assert sorted(path.name for path in works.folder.iterdir()) == ["a", "b"]
    assert await works.store.litter(9) == ["a", "b"]


async def test_lines_are_read_so_many_bytes_at_a_time(works: Works) -> None:
    await works.submit(jsonl(*(row(n) for n in range(1, 6))))
    await works.upkeep.work(Stage.VALIDATE)
    rows = await works.store.claim(5)
    results = [replace(result(one), line=bytes(10)) for one in rows]
    assert len(await works.store.finish(results)) == 5
    task = await taken(works.store, Stage.FINALIZE)
    for most_bytes, rows_read in ((25, 2), (1, 1), (50, 5)):
        some = await works.store.recorded(task, after=0, limit=9, most_bytes=most_bytes)
        assert [one.number for one in some] == list(range(1, rows_read + 1)), most_bytes


def opened(folder: Path) -> list[str]:
    """Files below it that this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in found if path.startswith(f"{folder}/")]


async def test_a_finalising_that_ends_early_lets_go_of_its_files(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it, and although the database does not hear of it."""
    await works.submit(jsonl(row(1), row(2)))
    await works.upkeep.work(Stage.VALIDATE)
    await works.answer(1)
    await works.answer(1, status=400)
    doomed: list[str] = []

    recorded = works.store.recorded

    async def cut(task: Task, *, after: int, limit: int) -> list[Recorded]:
        if after:
            raise asyncio.CancelledError
        return await recorded(task, after=after, limit=limit)

    async def away(blobs: Sequence[str]) -> None:
        doomed.extend(blobs)
        assert not opened(works.folder)
        raise StorageUnavailable("away")

    monkeypatch.setattr(works.store, "recorded", cut)
    monkeypatch.setattr(works.store, "doom", away)
    with pytest.raises(asyncio.CancelledError):
        await works.upkeep.work(Stage.FINALIZE)
    assert len(doomed) == 1
