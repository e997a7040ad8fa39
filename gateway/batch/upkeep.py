"""What has to be done for batches besides running their rows, and by whom: each gateway, always."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from backends.pause import pause
from gateway.batch.faults import Fenced, LeaseLost, StoreFault
from gateway.batch.files import Blobs
from gateway.batch.finalize import finalize
from gateway.batch.ingest import ingest
from gateway.batch.objects import Stage, Task
from gateway.batch.store import Store
from gateway.batch.validate import Limits
from policies.clock import Clock

log = structlog.get_logger("slackwater")

_IDLE_S: Final = 1.0
_AFTER_FAULT_S: Final = 5.0
_LITTER: Final = 100
_PURGED_ROWS: Final = 500
_BEATS: Final = 4
"""Heartbeats in a lease."""


@dataclass(slots=True, kw_only=True)
class Upkeep:
    """Loops that go on whatever happens to one turn of theirs; cancelled, they end."""

    store: Store
    blobs: Blobs
    clock: Clock
    now_us: Callable[[], int]
    new_id: Callable[[str], str]
    limits: Limits
    lease_lost: Callable[[], object]
    """Told when all rows that are held have to be dropped."""
    _renews: asyncio.Lock = field(default_factory=asyncio.Lock)
    _swept: str = ""
    """Of the blobs that are nobody's, the last that was looked at."""
    _wake: dict[Stage, asyncio.Event] = field(
        default_factory=lambda: {stage: asyncio.Event() for stage in Stage}
    )

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        loops = [self._beat()]
        loops += [self._repeat(turn, asyncio.Event()) for turn in (self.chores, self.sweep)]
        loops += [self._repeat(partial(self.work, stage), self._wake[stage]) for stage in Stage]
        return [tasks.create_task(loop) for loop in loops]

    def wake(self, stage: Stage) -> None:
        """There is work of this kind: it need not wait to be found."""
        self._wake[stage].set()

    async def _beat(self) -> None:
        lease_s = self.store.lease_us / 1e6
        while True:
            await pause(self.clock, lease_s / _BEATS)
            try:
                await self.renew()
            except StoreFault as fault:
                log.warning("the batch store does not take heartbeats", error=str(fault))
            except Exception:  # the loop's edge: the next beat may go
                log.exception("a heartbeat failed")

    async def renew(self) -> None:
        async with self._renews:
            try:
                await self.store.renew()
            except LeaseLost:
                log.warning("the lease on batch rows was lost: others run them, these are dropped")
                self.lease_lost()
                await self.store.join()

    async def _repeat(self, turn: Callable[[], Awaitable[bool]], wake: asyncio.Event) -> None:
        """At once again where there was something to do."""
        while True:
            wake.clear()
            wait_s = _IDLE_S
            try:
                if await turn():
                    wait_s = 0.0
            except StoreFault as fault:
                log.warning("the batch store is in trouble: trying again", error=str(fault))
                wait_s = _AFTER_FAULT_S
            except Exception:  # the loop's edge: the next turn may go
                log.exception("upkeep of batches failed")
                wait_s = _AFTER_FAULT_S
            await self._wait(wake, wait_s)

    async def _wait(self, wake: asyncio.Event, seconds: float) -> None:
        timer = self.clock.call_at(self.clock.time() + seconds, wake.set)
        try:
            await wake.wait()
        finally:
            timer.cancel()

    async def chores(self) -> bool:
        """Windows and leases that have run out, files past their time."""
        if await self.store.close_windows():
            self.wake(Stage.FINALIZE)
        if self.store.is_late:  # others may look next, and what we see of them is old
            await self.renew()
        await self.store.reap()
        return await self.store.expire_files() > 0

    async def sweep(self) -> bool:
        """Bytes that are nobody's; those that cannot be deleted keep no others from it."""
        blobs = await self.store.litter(_LITTER, after=self._swept)
        self._swept = blobs[-1] if len(blobs) == _LITTER else ""
        gone: list[str] = []
        fault: StoreFault | None = None
        for blob in blobs:
            try:
                await self.blobs.delete(blob)
            except StoreFault as one:
                fault = one
            else:
                gone.append(blob)
        if gone:
            await self.store.forget(gone)
        if fault is not None:
            raise fault
        return bool(gone)

    async def work(self, stage: Stage) -> bool:
        """One batch, where there is one that needs it."""
        task = await self.store.take(stage)
        if task is None:
            return False
        try:
            await self._do(stage, task)
        except Fenced as fault:
            log.info("work on a batch was given up", batch=task.batch.id, reason=str(fault))
        except BaseException:
            with suppress(StoreFault):  # then it is ours to take again, or free once we are gone
                await self.store.put_back(task)
            raise
        return True

    async def _do(self, stage: Stage, task: Task) -> None:
        match stage:
            case Stage.VALIDATE:
                await self._validate(task)
            case Stage.FINALIZE:
                await self._finalize(task)
            case Stage.PURGE:
                await self._purge(task)

    async def _validate(self, task: Task) -> None:
        batch = await ingest(self.store, self.blobs, task, self.limits)
        log.info(
            "a batch is validated",
            batch=batch.id,
            status=batch.status.value,
            rows=batch.counts.total,
            problems=len(batch.problems),
        )

    async def _finalize(self, task: Task) -> None:
        batch = await finalize(self.store, self.blobs, task, self.new_id, self.now_us)
        log.info(
            "a batch has ended",
            batch=batch.id,
            status=batch.status.value,
            completed=batch.counts.completed,
            failed=batch.counts.failed,
        )
        self.wake(Stage.PURGE)

    async def _purge(self, task: Task) -> None:
        while await self.store.drop_rows(task, _PURGED_ROWS):
            pass
        await self.store.purged(task)
