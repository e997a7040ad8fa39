"""How a database comes to be what this gateway knows."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, select, text

from gateway.batch import sqlite
from gateway.batch.database import Database
from gateway.batch.faults import StorageUnavailable, WrongVersion
from gateway.batch.tables import SCHEMA, VERSION, migrate
from tests.gateway.batch.conftest import Site
from tests.gateway.batch.stored import keep, new_file

pytestmark = pytest.mark.real_time


async def test_what_is_stored_is_there_when_it_is_opened_again(new_site: Site) -> None:
    file = await keep(await new_site.store(), new_file())
    assert await (await new_site.store(alone=True)).file("a", file.id) == file


async def test_gateways_may_start_together_on_a_new_database(new_site: Site) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(new_site.store())


async def test_an_older_database_is_brought_up_step_by_step(database: str) -> None:
    def add_column(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE slackwater_tenants ADD COLUMN more INTEGER"))

    def fill_it(connection: Connection) -> None:
        connection.execute(text("UPDATE slackwater_tenants SET more = 1"))

    opened = await Database.open(database)
    steps = {VERSION + 1: add_column, VERSION + 2: fill_it}
    for _ in range(2):
        await opened.write(
            lambda tx: tx.run_sync(lambda c: migrate(c, version=VERSION + 2, steps=steps))
        )
    async with opened.reading() as connection:
        assert await connection.scalar(select(SCHEMA.c.version)) == VERSION + 2
    await opened.close()
    with pytest.raises(WrongVersion):
        await Database.open(database)


async def test_a_migration_that_fails_has_changed_nothing(database: str) -> None:
    def fail(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE slackwater_tenants ADD COLUMN more INTEGER"))
        raise StorageUnavailable("half way")

    opened = await Database.open(database)
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="half way"):
            await opened.write(
                lambda tx: tx.run_sync(
                    lambda c: migrate(c, version=VERSION + 1, steps={VERSION + 1: fail})
                )
            )
    await opened.close()
    await (await Database.open(database)).close()


async def test_an_address_that_leads_nowhere_is_a_fault_and_no_traceback(database: str) -> None:
    nowhere = [
        "postgresql://nobody:x@127.0.0.1:1/x",
        "sqlite+aiosqlite:////no/such/folder/x",
        "nonsense",
        database.replace("/postgres?", "/nosuchdatabase?").replace("batch.sqlite", "no/x"),
    ]
    for url in nowhere:
        with pytest.raises(StorageUnavailable):
            await Database.open(url)


async def test_a_database_that_cannot_be_opened_leaves_no_thread_behind() -> None:
    """Threads that speak to their event loop: it may be closed a moment later."""
    before = set(threading.enumerate())
    for _ in range(20):
        with pytest.raises(StorageUnavailable):
            await Database.open("sqlite+aiosqlite:////no/such/folder/x")
        left = {each.name for each in set(threading.enumerate()) - before if each.is_alive()}
        assert not {name for name in left if "worker" in name}


def test_an_answer_that_comes_after_the_event_loops_end_disturbs_nobody(tmp_path: Path) -> None:
    goes_on = threading.Event()
    told: list[threading.ExceptHookArgs] = []

    async def leave_it() -> threading.Thread:
        connection = await sqlite.connect(str(tmp_path / "x"))
        await connection.create_function("hang", 0, lambda: goes_on.wait(10.0))
        asking = asyncio.ensure_future(connection.execute("SELECT hang()"))
        await asyncio.sleep(0.05)
        asking.cancel()
        connection.terminate()
        return connection._thread

    hook, threading.excepthook = threading.excepthook, told.append
    try:
        thread = asyncio.run(leave_it())
        goes_on.set()
        thread.join(10.0)
    finally:
        threading.excepthook = hook
    assert not thread.is_alive()
    assert not told
