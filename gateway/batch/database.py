"""How a transaction runs on either database, and what its failures are called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Final, Self, TypeVar
from weakref import WeakSet

from sqlalchemy import Connection, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from gateway.batch import sqlite
from gateway.batch.faults import StorageFull, StorageUnavailable
from gateway.batch.tables import migrate

T = TypeVar("T")

_CONNECTIONS: Final = 5
_PATIENCE_S: Final = 5.0
"""For a lock that somebody else holds, and for a connection."""
_TRIES: Final = 5
_DRIVERS: Final = {"postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_COLLISIONS: Final = ("40001", "40P01")
"""PostgreSQL's words for transactions that stood in each other's way: again, they may pass."""
_FULL: Final = ("SQLITE_FULL", "53100")


class Database:
    """Reads go side by side. Writes of one process to SQLite, which takes one at a time, queue
    up here, where waiting costs nothing."""

    def __init__(self, engine: AsyncEngine, leases: AsyncEngine) -> None:
        """`leases`: a second pool, where heartbeats do not wait behind long lists."""
        self._engines = {False: engine, True: leases}
        self._turn = asyncio.Lock() if engine.dialect.name == "sqlite" else None
        self._drivers: WeakSet[Any] = WeakSet()
        self._is_given_up = False
        for one in self._engines.values():
            event.listen(one.sync_engine, "connect", self._note)

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connects, and brings the tables up to date."""
        with naming_failures():
            address = address_of(url)
            database = cls(_engine_of(address, _CONNECTIONS), _engine_of(address, 1))
        try:
            await database.write(lambda connection: connection.run_sync(migrate))
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.dispose()

    def give_up(self) -> None:
        """What is under way fails now, wherever it hangs, and so does all that comes later."""
        self._is_given_up = True
        for driver in list(self._drivers):
            driver.terminate()

    def _note(self, connection: Any, _: object) -> None:
        driver = connection.driver_connection
        self._drivers.add(driver)
        if self._is_given_up:
            driver.terminate()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        self._check()
        with naming_failures():
            async with self._engines[False].connect() as connection:
                yield connection

    async def write(
        self, change: Callable[[AsyncConnection], Awaitable[T]], *, of_lease: bool = False
    ) -> T:
        """All of the change or nothing. It may run again after a collision with another."""
        engine = self._engines[of_lease].execution_options(slackwater_writes=True)
        with naming_failures():
            async with AsyncExitStack() as stack:
                if self._turn is not None:
                    async with asyncio.timeout(sqlite.ANSWER_S):
                        await stack.enter_async_context(self._turn)
                for _ in range(_TRIES - 1):
                    try:
                        return await self._once(engine, change)
                    except DBAPIError as error:
                        if not _is_collision(error):
                            raise
                return await self._once(engine, change)

    async def _once(
        self, engine: AsyncEngine, change: Callable[[AsyncConnection], Awaitable[T]]
    ) -> T:
        self._check()
        async with engine.begin() as connection:
            return await change(connection)

    def _check(self) -> None:
        if self._is_given_up:
            raise StorageUnavailable("the database: the gateway ends")


def address_of(url: str) -> URL:
    """PostgreSQL's usual address is enough: there is one driver for it."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StorageUnavailable("the database's address is not one") from error
    return parsed.set(drivername=_DRIVERS.get(parsed.drivername, parsed.drivername))


def _engine_of(url: URL, connections: int) -> AsyncEngine:
    if url.get_backend_name() != "sqlite":
        timeouts = {"timeout": _PATIENCE_S, "command_timeout": sqlite.ANSWER_S}
        return create_async_engine(
            url,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=_PATIENCE_S,
            pool_pre_ping=True,
            connect_args=timeouts,
        )
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=_PATIENCE_S,
        connect_args={"timeout": _PATIENCE_S, "async_creator_fn": sqlite.connect},
    )
    event.listen(engine.sync_engine, "connect", _prepare)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _prepare(connection: Any, _: object) -> None:
    """Readers beside the writer, and a commit that a power cut does not take back."""
    connection.isolation_level = None  # transactions begin where _begin says
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-16384"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    """A writer takes its lock at once: it cannot lose it to another half way."""
    writes = connection.get_execution_options().get("slackwater_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def naming_failures() -> Iterator[None]:
    try:
        yield
    except IntegrityError:  # a bug of ours, once it has survived every retry
        raise
    except DBAPIError as error:
        cause = error.orig or error
        kind = StorageFull if _name_of(cause) in _FULL else StorageUnavailable
        raise kind(f"the database: {_words_of(cause)}") from error
    except PoolTimeout as error:
        raise StorageUnavailable("the database: every connection is busy") from error
    except TimeoutError as error:
        raise StorageUnavailable("the database: no answer in time") from error
    except OSError as error:
        raise StorageUnavailable(f"the database: {error}") from error
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        raise StorageUnavailable(f"the database: {error}") from error


def _is_collision(error: DBAPIError) -> bool:
    """Two that insert the same key are one, too: the second finds it there when it tries again."""
    return isinstance(error, IntegrityError) or _name_of(error.orig or error) in _COLLISIONS


def _name_of(error: BaseException) -> str:
    return getattr(error, "sqlite_errorname", None) or getattr(error, "sqlstate", None) or ""


def _words_of(error: BaseException) -> str:
    """asyncpg's errors begin with the name of their class."""
    text = str(error)
    return text.partition(">: ")[2] or text
