"""A disk that is full, a database that is locked, read-only or away: the gateway stays up."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch import database as databases
from gateway.batch.database import Database
from gateway.batch.faults import StorageFull, StorageUnavailable
from gateway.batch.files import Blobs, Folder, Writing
from gateway.batch.store import Store
from gateway.config import Key
from gateway.settings import ConfigError
from tests.gateway.batch.conftest import Site
from tests.gateway.batch.served import jsonl, row, served
from tests.gateway.batch.stored import keep, new_file
from tests.gateway.batch.test_bad_uploads import form, headers

pytestmark = [pytest.mark.real_time, pytest.mark.usefixtures("_sweeps_often")]

KEY = Key(key="one", tenant="one")


async def test_a_locked_database_is_an_error_and_works_again_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_PATIENCE_S", 0.2)
    async with served(tmp_path, KEY) as site:
        stranger = sqlite3.connect(
            tmp_path / "batches.sqlite", isolation_level=None, check_same_thread=False
        )
        await asyncio.to_thread(stranger.execute, "BEGIN IMMEDIATE")  # it may have to wait for us
        status, body = await site.ask(
            "POST", "/v1/files", data=form(jsonl(row(1))), headers=headers()
        )
        assert (status, body["error"]["code"]) == (503, "storage_unavailable")
        assert "locked" in body["error"]["message"]
        assert (await site.ask("GET", "/v1/files", headers=headers()))[1]["data"] == []
        assert (await site.http.get(f"{site.url}/liveness")).status == 200
        stranger.close()
        status, _ = await site.ask("POST", "/v1/files", data=form(jsonl(row(1))), headers=headers())
        assert status == 200


async def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    def full(path: Path, flags: int) -> int:
        os.close(os.open(path, flags))
        return os.open("/dev/full", os.O_WRONLY)

    async with served(tmp_path, KEY) as site:
        _, blobs = site.service.opened()
        blobs.shelf = Folder(tmp_path / "files", opened=full)
        status, body = await site.ask(
            "POST", "/v1/files", data=form(jsonl(row(1))), headers=headers()
        )
        assert (status, body["error"]["code"]) == (507, "storage_full")
        assert (await site.ask("GET", "/v1/files", headers=headers()))[1]["data"] == []

        async def is_swept() -> bool:
            return site.stored() == []

        await site.until(is_swept)


async def test_what_a_full_disk_has_of_an_upload_goes_without_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have no room for the note that these bytes are litter, and they are what fills it."""

    class Filled(Folder):
        def create(self, blob: str) -> Writing:
            (tmp_path / "files" / blob).write_bytes(b"all that fitted")
            return open("/dev/full", "wb", buffering=0)

    async def doom(store: Store, blobs: Sequence[str]) -> None:
        raise StorageFull("the database: database or disk is full")

    monkeypatch.setattr(Store, "doom", doom)
    async with served(tmp_path, KEY) as site:
        _, blobs = site.service.opened()
        blobs.shelf = Filled(tmp_path / "files")
        status, _ = await site.ask("POST", "/v1/files", data=form(jsonl(row(1))), headers=headers())
        assert status == 507

        async def is_gone() -> bool:
            return site.stored() == []

        await site.until(is_gone)


async def test_a_full_database_is_named_and_has_changed_nothing(tmp_path: Path) -> None:
    store = await Store.open(
        f"sqlite+aiosqlite:///{tmp_path}/x", owner="x", now_us=lambda: 1, lease_us=1, alone=True
    )

    async def limit(pages: int) -> None:
        async def change(tx: AsyncConnection) -> None:
            await tx.execute(text(f"PRAGMA max_page_count = {pages}"))

        await store._database.write(change)

    async def fill() -> None:
        for number in range(3_000):
            await store.announce(f"{number:064d}")

    await keep(store, new_file())
    await limit(1)
    with pytest.raises(StorageFull):
        await fill()
    await limit(2**30)
    await keep(store, new_file())
    assert len((await store.files("a", limit=9))[0]) == 2
    await store.close()


async def test_a_read_only_database_is_named(site: Site, store: Store) -> None:
    async def change(tx: AsyncConnection) -> None:
        is_sqlite = tx.dialect.name == "sqlite"
        await tx.execute(
            text("PRAGMA query_only = ON" if is_sqlite else "SET TRANSACTION READ ONLY")
        )
        await tx.execute(text("DELETE FROM slackwater_blobs"))

    with pytest.raises(StorageUnavailable, match=r"read-?only"):
        await store._database.write(change)


async def test_a_postgres_that_is_away_leaves_the_rest_of_the_gateway_up(tmp_path: Path) -> None:
    url = f"postgresql://nobody@/nothing?host={tmp_path}"
    async with served(tmp_path / "files", KEY, database=url) as site:
        status, body = await site.ask("GET", "/v1/batches", headers=headers())
        assert (status, body["error"]["code"]) == (503, "storage_unavailable")
        assert (await site.http.get(f"{site.url}/liveness")).status == 200


async def test_a_folder_is_one_gateways_at_a_time(tmp_path: Path) -> None:
    async with served(tmp_path, KEY):
        with pytest.RaisesGroup(ConfigError, flatten_subgroups=True):
            async with served(tmp_path, KEY):
                pass


async def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.RaisesGroup(ConfigError, flatten_subgroups=True):
        async with served(tmp_path / "file", KEY):
            pass


async def test_blobs_of_a_folder_that_has_gone_are_an_error(tmp_path: Path) -> None:
    blobs = Blobs(Folder(tmp_path / "files"))
    os.rmdir(tmp_path / "files")
    with pytest.raises(Exception, match="gone"):
        await blobs.create("one")
    blobs.close()


async def test_a_store_that_cannot_be_set_in_order_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Database] = []
    close = Database.close

    async def noted(database: Database) -> None:
        closed.append(database)
        await close(database)

    async def away(store: Store, before_us: int) -> int:
        raise StorageUnavailable("away")

    monkeypatch.setattr(Database, "close", noted)
    monkeypatch.setattr(Store, "_reap", away)
    with pytest.raises(StorageUnavailable):
        await Store.open(
            f"sqlite+aiosqlite:///{tmp_path}/x", owner="x", now_us=lambda: 1, lease_us=1, alone=True
        )
    assert len(closed) == 1
