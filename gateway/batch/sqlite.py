"""SQLite's connections: each has a thread of its own, and none is waited for without end."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, TypeVar

import aiosqlite
from aiosqlite.core import _connection_worker_thread

T = TypeVar("T")

ANSWER_S: Final = 60.0
"""For any statement, and for a disk that hangs."""
_GONE_S: Final = 1.0


class Connection(aiosqlite.Connection):
    """Once a statement has had no answer in time it is of no use any more: its thread lets go of
    the database when, and if, that returns."""

    _is_lost = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._thread = Thread(target=_live, args=(self._tx,), daemon=True)
        self._waits: set[asyncio.Timeout] = set()

    def __del__(self) -> None:
        if not self._is_lost:
            super().__del__()  # type: ignore[no-untyped-call]

    async def _execute(self, fn: Any, *args: Any, **options: Any) -> Any:
        """Everything that is done on a connection comes here."""
        if self._is_lost:
            raise aiosqlite.OperationalError("connection closed")
        work = super()._execute(fn, *args, **options)  # type: ignore[no-untyped-call]
        return await self._in_time(work)

    async def close(self) -> None:
        if not self._is_lost:
            await self._in_time(super().close())

    def terminate(self) -> None:
        """Whoever waits for it does so no longer."""
        self._lose()
        for wait in self._waits:
            wait.reschedule(0.0)

    async def _in_time(self, work: Awaitable[T]) -> T:
        wait = asyncio.timeout(ANSWER_S)
        try:
            async with wait:
                self._waits.add(wait)
                try:
                    return await work
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            self._lose()
            raise aiosqlite.OperationalError("no answer in time, connection closed") from None

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            if self._connection is not None:  # closed, it would have its lock until it is collected
                self._tx.put_nowait((None, self._connection.rollback))
            self.stop()


async def connect(path: str, **options: Any) -> Connection:
    """aiosqlite does not wait for the end of a thread that could not open: it would speak to an
    event loop that may be closed by then."""

    connection = Connection(partial(sqlite3.connect, path, **options), iter_chunk_size=64)
    try:
        async with asyncio.timeout(ANSWER_S):
            return await connection  # type: ignore[return-value]
    except BaseException:
        await asyncio.to_thread(connection._thread.join, _GONE_S)
        raise


def _live(calls: SimpleQueue[Any]) -> None:
    with suppress(RuntimeError):  # an answer that came after the event loop's end is nobody's
        _connection_worker_thread(calls)
