"""Threads for what may never return: neither the event loop nor the process waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from gateway.batch.faults import StorageUnavailable

T = TypeVar("T")

_Call = tuple[Future[Any], Callable[[], Any]]


class Threads:
    """The interpreter joins those of `concurrent.futures` before it ends, hung ones included."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._awaited: set[Future[Any]] = set()
        self._is_closed = False

    async def call(self, work: Callable[[], T]) -> T:
        """Cancelled, it ends at once; the work goes on in its thread, unless it has not begun."""
        if self._is_closed:
            raise StorageUnavailable("the files: the gateway ends")
        answer: Future[T] = Future()
        self._awaited.add(answer)
        self._calls.put((answer, work))
        if len(self._threads) < self._most:
            thread = Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        try:
            return await asyncio.wrap_future(answer)
        finally:
            self._awaited.discard(answer)

    def close(self) -> None:
        """Whoever still waits is told that it came to nothing."""
        self._is_closed = True
        for answer in list(self._awaited):
            with suppress(InvalidStateError):
                answer.set_exception(StorageUnavailable("the files: the gateway ends"))
        for _ in self._threads:
            self._calls.put(None)


def _work(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        answer, work = call
        del call
        if answer.done() or not answer.set_running_or_notify_cancel():
            continue
        with suppress(InvalidStateError):  # it was told that it came to nothing
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - it is the caller's, whatever it is
                answer.set_exception(error)
            else:
                answer.set_result(result)
        del answer, work
