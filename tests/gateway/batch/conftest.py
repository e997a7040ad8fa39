from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import asyncpg  # type: ignore[import-untyped]
import pytest

from benchmarks import postgres
from gateway.batch.store import Store
from tests.gateway.batch.postgres import is_included

DATABASES = ("sqlite", *(("postgresql",) if is_included() else ()))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with postgres.running(durable=False) as url:
        yield url


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a new database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/batch.sqlite"
    url: str = request.getfixturevalue("server")
    asyncio.run(_emptied(url))
    return url


async def _emptied(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
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
async def site(database: str) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield Site(database, stack)


@pytest.fixture
async def store(site: Site) -> Store:
    return await site.store()
