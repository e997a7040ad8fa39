"""What hangs: a disk, a bucket, a database. The gateway starts, serves and ends nevertheless."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.app import _stop
from gateway.batch import files, service, sqlite
from gateway.batch.database import Database
from gateway.batch.faults import StorageUnavailable
from gateway.batch.files import Blobs, Folder, Range, Shelf
from gateway.config import Key
from tests.gateway.batch.conftest import Site
from tests.gateway.batch.served import jsonl, row, served
from tests.gateway.batch.stored import result, running
from tests.gateway.batch.test_bad_uploads import form, headers

pytestmark = pytest.mark.real_time

KEY = Key(key="one", tenant="one")
A_THREAD_THAT_HANGS = """
import asyncio, threading
from gateway.batch.threads import Threads

async def main():
    begun = threading.Event()
    def hang():
        begun.set()
        threading.Event().wait()
    threads = Threads(1, "files")
    call = asyncio.ensure_future(threads.call(hang))
    while not begun.is_set():
        await asyncio.sleep(0.01)
    threads.close()
    await asyncio.wait([call])

asyncio.run(main())
"""


@pytest.fixture
async def released() -> AsyncIterator[threading.Event]:
    """What hangs goes on once this is set."""
    before, event = set(threading.enumerate()), threading.Event()
    yield event
    event.set()
    for thread in set(threading.enumerate()) - before:
        if "connection_worker" in thread.name:  # it speaks to the event loop once more
            await asyncio.to_thread(thread.join, 2.0)


@pytest.fixture
async def opened(database: str, released: threading.Event) -> AsyncIterator[Database]:
    made = await Database.open(database)
    yield made
    async with asyncio.timeout(5):
        await made.close()


async def hung(database: Database, released: threading.Event) -> asyncio.Task[None]:
    """A change that has no answer, under way."""
    begun = asyncio.Event()

    async def change(tx: AsyncConnection) -> None:
        is_sqlite = tx.dialect.name == "sqlite"
        if is_sqlite:
            raw = await tx.get_raw_connection()
            assert raw.driver_connection is not None
            await raw.driver_connection.create_function("hang", 0, released.wait)
        begun.set()
        await tx.execute(text("SELECT hang()" if is_sqlite else "SELECT pg_sleep(60)"))

    task = asyncio.create_task(database.write(change))
    await begun.wait()
    return task


class Unhurried:
    was_hurried = False

    async def run(self) -> None: ...

    def drain(self, within_s: float) -> None: ...

    def hurry(self) -> None:
        self.was_hurried = True

    def lease_lost(self) -> None: ...

    def poke(self) -> None: ...


async def one(tx: AsyncConnection) -> object:
    return await tx.scalar(text("SELECT 1"))


async def test_a_disk_that_hangs_under_sqlite_is_given_up(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path}/x")
    monkeypatch.setattr(sqlite, "ANSWER_S", 0.2)
    task = await hung(database, released)
    with pytest.raises(StorageUnavailable, match="in time"):
        await task
    with pytest.raises(StorageUnavailable, match=r"locked|in time"):
        await database.write(one)  # the disk hangs still: nobody else may write
    released.set()
    monkeypatch.undo()
    assert await database.write(one) == 1
    await database.close()


async def test_a_database_that_is_given_up_lets_everybody_go(
    opened: Database, released: threading.Event
) -> None:
    task = await hung(opened, released)
    waiting = asyncio.create_task(opened.write(one))
    await asyncio.sleep(0.05)
    opened.give_up()
    async with asyncio.timeout(5):
        await asyncio.wait([task, waiting])
    assert isinstance(task.exception(), StorageUnavailable)
    with pytest.raises(StorageUnavailable, match="ends"):
        await opened.write(one)


async def test_a_gateway_ends_although_its_database_hangs(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_END_S", 0.3)
    async with served(tmp_path, KEY) as site:
        store, _ = site.service.opened()
        task = await hung(store._database, released)
        async with asyncio.timeout(5):
            await site.gateway.close()
        assert isinstance((await asyncio.wait([task]))[0].pop().exception(), StorageUnavailable)


async def test_a_second_signal_ends_a_gateway_that_waits_for_its_database(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_END_S", 600.0)
    monkeypatch.setattr(service, "_HURRIED_END_S", 0.1)
    async with served(tmp_path, KEY) as site:
        store, _ = site.service.opened()
        task = await hung(store._database, released)
        site.service._runner = runner = Unhurried()
        closing = asyncio.create_task(site.gateway.close())
        await asyncio.sleep(0.3)
        assert not closing.done()
        stop = asyncio.Event()
        stop.set()
        async with asyncio.timeout(5):
            _stop(stop, site.gateway)
            await closing
        assert isinstance((await asyncio.wait([task]))[0].pop().exception(), StorageUnavailable)
        assert runner.was_hurried


async def test_a_bucket_that_hangs_at_the_start_keeps_nothing_else_waiting(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(place: str) -> Shelf:
        released.wait()
        return Folder(Path(place))

    monkeypatch.setattr(service, "shelf_at", slow)
    monkeypatch.setattr(service, "_PLACE_S", 0.1)
    monkeypatch.setattr(service, "_RETRY_S", 0.05)
    async with asyncio.timeout(10), served(tmp_path, KEY) as site:
        status, body = await site.ask("GET", "/v1/batches", headers=headers())
        assert (status, body["error"]["code"]) == (503, "storage_unavailable")
        assert (await site.http.get(f"{site.url}/liveness")).status == 200
        released.set()

        async def is_open() -> bool:
            return (await site.ask("GET", "/v1/batches", headers=headers()))[0] == 200

        await site.until(is_open)


class Hanging(Folder):
    def __init__(self, path: Path, wait: Callable[[], object]) -> None:
        super().__init__(path)
        self._wait = wait

    def read(self, blob: str, ranges: Sequence[Range]) -> list[bytes]:
        self._wait()
        return super().read(blob, ranges)


async def test_who_waits_for_a_disk_at_the_end_is_told_that_it_came_to_nothing(
    tmp_path: Path, released: threading.Event
) -> None:
    blobs = Blobs(Hanging(tmp_path, released.wait))
    readers = [asyncio.create_task(blobs.read("one", 0, 1)) for _ in range(9)]
    await asyncio.sleep(0.05)
    blobs.close()
    async with asyncio.timeout(5):
        await asyncio.wait(readers)
    assert {type(reader.exception()) for reader in readers} == {StorageUnavailable}


async def test_lists_do_not_wait_for_threads_that_hang(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, KEY) as site:
        _, blobs = site.service.opened()
        blobs.shelf = Hanging(tmp_path / "files", released.wait)
        readers = [asyncio.create_task(blobs.read("one", 0, 1)) for _ in range(4)]
        await asyncio.sleep(0.05)
        monkeypatch.setattr(files, "_PATIENCE_S", 0.1)
        async with asyncio.timeout(5):
            status, body = await site.ask("GET", "/v1/files", headers=headers())
        assert (status, body["error"]["code"]) == (503, "storage_unavailable")
        released.set()
        await asyncio.wait(readers)


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", A_THREAD_THAT_HANGS], timeout=30, check=False)
    assert done.returncode == 0


async def test_a_heartbeat_has_a_connection_when_lists_have_taken_the_others(site: Site) -> None:
    store = await site.store()
    await running(store, rows=1)
    held = await store.claim(1)
    begun = [asyncio.Event() for _ in range(5)]
    over = asyncio.Event()

    async def long(event: asyncio.Event) -> None:
        async with store._database.reading() as connection:
            await one(connection)
            event.set()
            await over.wait()

    lists = [asyncio.create_task(long(event)) for event in begun]
    for event in begun:
        await event.wait()
    site.wait(9)
    async with asyncio.timeout(3):
        await store.renew()
    over.set()
    await asyncio.wait(lists)
    site.wait(9)
    other = await site.store()
    assert await other.reap() == 0
    assert len(await store.finish([result(row) for row in held])) == 1


async def test_uploads_on_their_way_take_of_the_quota(tmp_path: Path) -> None:
    """Nobody knows beforehand how long those are that come in chunks."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 65_536
        begun.set()
        await go_on.wait()

    async with served(tmp_path, KEY, max_file_mb=1.0, stored_gb=0.0008) as site:
        first = asyncio.create_task(
            site.ask("POST", "/v1/files", data=form(slowly()), headers=headers())
        )
        await begun.wait()
        arrivals = site.service._pages._arrivals

        async def has_come() -> bool:
            room = arrivals._rooms.get("one")
            return room is not None and room.arriving_bytes > 500_000

        await site.until(has_come)
        status, body = await site.ask(
            "POST", "/v1/files", data=form(b"x" * 400_000), headers=headers()
        )
        assert (status, body["error"]["code"]) == (429, "quota_exceeded")
        go_on.set()
        assert (await first)[0] == 200
        assert (await site.ask("POST", "/v1/files", data=form(jsonl(row(1))), headers=headers()))[
            0
        ] == 200
        assert len(arrivals) == 0
