from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from shutil import copyfile

import asyncpg  # type: ignore[import-untyped]
import pytest

from benchmarks import postgres
from gateway.batch import upkeep
from gateway.batch.database import Database
from gateway.batch.store import Store
from gateway.batch.tables import METADATA, SCHEMA
from tests.gateway.batch.postgres import is_included

DATABASES = ("sqlite", *(("postgresql",) if is_included() else ()))
FILE = "batch.sqlite"
FILLED = sorted(table.name for table in METADATA.tables.values() if table is not SCHEMA)


@pytest.fixture
def _sweeps_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is nothing to a batch, and long to a test that waits for it."""
    monkeypatch.setattr(upkeep, "_IDLE_S", 0.2)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with postgres.running(durable=False) as url:
        yield url


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a new database."""
    if request.param == "sqlite":
        return address(tmp_path)
    url: str = request.getfixturevalue("server")
    asyncio.run(_does(url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    return url


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables: to make them takes longer than most tests."""
    folder = tmp_path_factory.mktemp("empty")
    asyncio.run(_made(address(folder)))
    assert [path.name for path in folder.iterdir()] == [FILE]
    return folder / FILE


@pytest.fixture(scope="session")
def empty_tables(server: str) -> str:
    """The same, beside the database that others have anew."""
    asyncio.run(_does(server, "CREATE DATABASE empty"))
    url = server.replace("/postgres?", "/empty?")
    asyncio.run(_made(url))
    return url


@pytest.fixture(params=DATABASES)
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a database with nothing in its tables."""
    if request.param == "sqlite":
        copyfile(request.getfixturevalue("empty_file"), tmp_path / FILE)
        return address(tmp_path)
    url: str = request.getfixturevalue("empty_tables")
    asyncio.run(_does(url, f"TRUNCATE {', '.join(FILLED)} RESTART IDENTITY"))
    return url


def address(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / FILE}"


async def _made(url: str) -> None:
    await (await Database.open(url)).close()


async def _does(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


@dataclass
class Site:
    """Gateways on one database, and their time."""

    url: str
    stack: AsyncExitStack
    now_us: int = 1_700_000_000_000_000
    lease_us: int = 10_000_000
    _names: count[int] = field(default_factory=count)

    def wait(self, seconds: float) -> None:
        self.now_us += round(seconds * 1e6)

    async def store(self, *, alone: bool = False, joins: bool = True) -> Store:
        """One more gateway."""
        store = await Store.open(
            self.url,
            owner=f"gateway-{next(self._names)}",
            now_us=lambda: self.now_us,
            lease_us=self.lease_us,
            alone=alone,
        )
        self.stack.push_async_callback(store.close)
        if joins:
            await store.join()
        return store


@pytest.fixture
async def site(empty: str) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(empty, stack)


@pytest.fixture
async def new_site(database: str) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(database, stack)


@pytest.fixture
async def store(site: Site) -> Store:
    return await site.store()
