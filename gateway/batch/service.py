"""The Batch API as a part of the gateway: opened, kept going beside online work, and closed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Final, Protocol

import structlog

from backends.pause import pause
from gateway.batch.faults import StorageUnavailable, StoreFault, WrongVersion
from gateway.batch.files import Blobs, in_time, shelf_at
from gateway.batch.objects import Stage
from gateway.batch.routes import Pages, Shell
from gateway.batch.settings import BatchSettings
from gateway.batch.store import Store
from gateway.batch.threads import Threads
from gateway.batch.throttle import Throttle
from gateway.batch.upkeep import Upkeep
from gateway.batch.validate import Limits
from gateway.router import Route
from gateway.settings import ConfigError
from policies.clock import Clock, Timer

log = structlog.get_logger("slackwater")

_RETRY_S: Final = 5.0
_PLACE_S: Final = 10.0
"""For the place of the files, while nothing else is served yet."""
_END_S: Final = 10.0
"""For what is held to be given back at the end; later than that its lease will."""
_HURRIED_END_S: Final = 1.0
_MAX_LINE_BYTES: Final = 16 * 1_048_576


class Runs(Protocol):
    """Whoever runs the rows."""

    async def run(self) -> None:
        """Until it is drained."""

    def drain(self, within_s: float) -> None: ...

    def hurry(self) -> None:
        """Gives back at once what has not ended."""

    def lease_lost(self) -> None: ...

    def poke(self) -> None:
        """There may be rows to run, or some that nobody wants any more."""


MakeRunner = Callable[[Store, Blobs], Runs]


class Service:
    """A database that cannot be reached leaves the routes with an error, and everything else as
    it is; it is tried again."""

    def __init__(
        self,
        settings: BatchSettings,
        shell: Shell,
        clock: Clock,
        rng: Random,
        now_us: Callable[[], int],
        make_runner: MakeRunner | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._now_us = now_us
        self._make_runner = make_runner
        self._pages = Pages(
            settings, shell, self.opened, self._new_id, now_us, self._spawn, self._wake
        )
        self._owner = f"{socket.gethostname()[:40]}-{os.getpid()}-{rng.getrandbits(48):012x}"
        self._lock: int | None = None
        self._blobs: Blobs | None = None
        self._store: Store | None = None
        self._why = "it is not open yet"
        self._upkeep: Upkeep | None = None
        self._runner: Runs | None = None
        self._running: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._tidying: set[asyncio.Task[None]] = set()
        self._place = Threads(1, "slackwater-place")
        self._end_s = _END_S
        self._end: Timer | None = None

    def routes(self) -> list[Route]:
        return self._pages.routes()

    def opened(self) -> tuple[Store, Blobs]:
        if self._store is None or self._blobs is None:
            raise StorageUnavailable(f"the database: {self._why}")
        return self._store, self._blobs

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """ConfigError where waiting would not help."""
        self._tasks = tasks
        try:
            self._prepare()
            await self._open()
        except WrongVersion as fault:
            raise ConfigError(f"batch: {fault}") from fault
        except StoreFault as fault:
            self._note(fault)
            self._loops.append(tasks.create_task(self._open_later()))

    def _prepare(self) -> None:
        """What is on this machine."""
        settings = self._settings
        if settings.database and find_spec("asyncpg") is None:
            raise ConfigError("batch.database needs PostgreSQL's driver: slackwater[postgres]")
        try:
            if settings.folder:
                Path(settings.folder).mkdir(parents=True, exist_ok=True)
            if not settings.database:
                self._lock = _lock(Path(settings.folder) / "lock")
                _make_private(Path(settings.folder) / "batches.sqlite")
        except OSError as error:
            raise ConfigError(f"batch.folder {settings.folder}: {error.strerror}") from None

    async def _open(self) -> None:
        settings = self._settings
        if self._blobs is None:
            place = settings.files or str(Path(settings.folder) / "files")
            shelf = await in_time(self._place, _PLACE_S, partial(shelf_at, place))
            self._blobs = Blobs(shelf, Throttle(self._clock, settings.files_mb_per_s * 1e6))
        path = Path(settings.folder) / "batches.sqlite"
        store = await Store.open(
            settings.database or f"sqlite+aiosqlite:///{path}",
            owner=self._owner,
            now_us=self._now_us,
            lease_us=round(settings.lease_s * 1e6),
            alone=not settings.database,
        )
        try:
            await store.join()
        except BaseException:
            await store.close()
            raise
        self._begin(store, self._blobs)

    def _begin(self, store: Store, blobs: Blobs) -> None:
        assert self._tasks is not None
        self._store = store
        self._upkeep = Upkeep(
            store=store,
            blobs=blobs,
            clock=self._clock,
            now_us=self._now_us,
            new_id=self._new_id,
            limits=Limits(max_rows=self._settings.max_rows, max_line_bytes=_MAX_LINE_BYTES),
            lease_lost=self._lease_lost,
        )
        self._loops += self._upkeep.start(self._tasks)
        if self._make_runner is not None:
            self._runner = self._make_runner(store, blobs)
            self._running = self._tasks.create_task(self._runner.run())

    async def _open_later(self) -> None:
        while self._store is None:
            await pause(self._clock, _RETRY_S)
            try:
                await self._open()
            except StoreFault as fault:
                self._note(fault)
            except Exception:  # the task's edge: online requests need no database
                log.exception("the batch store could not be opened")

    def _note(self, fault: StoreFault) -> None:
        self._why = str(fault).removeprefix("the database: ")
        log.warning("no Batch API for now: trying again", error=str(fault))

    def _lease_lost(self) -> None:
        if self._runner is not None:
            self._runner.lease_lost()

    def _wake(self, stage: Stage) -> None:
        if self._upkeep is not None:
            self._upkeep.wake(stage)
        if self._runner is not None:
            self._runner.poke()

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}{self._rng.getrandbits(128):032x}"

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None
        task = self._tasks.create_task(_tidied(work))
        self._tidying.add(task)
        task.add_done_callback(self._tidying.discard)

    # The end.

    def drain(self, within_s: float) -> None:
        if self._runner is not None:
            self._runner.drain(within_s)

    def hurry(self) -> None:
        """A second signal: nobody waits any more for a store that does not answer."""
        self._end_s = _HURRIED_END_S
        if self._runner is not None:
            self._runner.hurry()
        if self._end is not None:
            self._end.cancel()
            self._end = self._cut_off_later()

    async def close(self) -> None:
        """What is held is given back, where the store can be told in time."""
        self._end = self._cut_off_later()
        try:
            await self._give_back()
        finally:
            self._end.cancel()
            self._let_go()

    def _cut_off_later(self) -> Timer:
        return self._clock.call_at(self._clock.time() + self._end_s, self._cut_off)

    async def _give_back(self) -> None:
        if self._running is not None and self._runner is not None:
            self._runner.drain(0.0)
            await asyncio.wait([self._running])
        for loop in self._loops:
            loop.cancel()
        if ending := [*self._loops, *self._tidying]:
            await asyncio.wait(ending)
        if self._store is not None:
            await _last_words(self._store)

    def _cut_off(self) -> None:
        """Whatever hangs, what waits for it fails now, and so all of it ends."""
        log.warning("the store of batches does not answer: the gateway ends without it")
        if self._store is not None:
            self._store.give_up()
        self._let_go()
        for task in (self._running, *self._loops):
            if task is not None:
                task.cancel()

    def _let_go(self) -> None:
        self._place.close()
        if self._blobs is not None:
            self._blobs.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


async def _last_words(store: Store) -> None:
    try:
        await store.leave()
    except StoreFault as fault:
        log.warning("rows of batches could not be given back: their lease will", error=str(fault))
    await store.close()


async def _tidied(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except StoreFault as fault:
        log.warning("what an upload has left is swept up later", error=str(fault))
    except Exception:  # the task's edge: litter must not end the gateway
        log.exception("what an upload has left could not be given up")


def _make_private(path: Path) -> None:
    """Answers are nobody else's to read. SQLite gives what it writes beside it the same rights."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _lock(path: Path) -> int:
    """Held until this process ends, however it does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"batch.folder {path.parent} is in use by another gateway: several of them share "
            "a batch.database"
        ) from None
    return descriptor
