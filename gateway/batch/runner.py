"""Runs the rows of batches: which are in memory, and when the store is told what became of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import structlog

from backends.checkpoint import Checkpoint
from backends.pause import pause
from gateway.batch.absences import ABSENT, Absences
from gateway.batch.attempts import Attempts, Later, Outcome
from gateway.batch.faults import LeaseLost, StoreFault
from gateway.batch.held import Held, Mark, marks_of
from gateway.batch.objects import Batch, Result, Row
from gateway.batch.outbox import Outbox, Told
from gateway.batch.pace import Pace, PaceRule
from gateway.batch.reading import Bodies, read
from gateway.batch.strikes import Strikes
from gateway.batch.tally import Tally
from gateway.batch.verdicts import Again, verdict
from gateway.dialects import ROUTES, Dialect
from gateway.errors import Code
from gateway.visit import Errand, Visit
from policies.clock import Clock

log = structlog.get_logger("slackwater.batch")

_TURN_S = 0.5
"""At least so often there is a look; what ends brings one sooner."""
_GATHER_S = 0.1
"""Rows that end within this time are recorded together: each transaction costs the event loop some
milliseconds, whatever is in it."""
_BREATH_S = 0.02
"""Between turns that follow each other: online requests have the event loop meanwhile."""
_SURVEY_S = 5.0
_TROUBLE_S = 1.0
"""A store that fails is left alone for this long."""
_AT_ONCE = 32
"""Rows that are claimed, and begin, together: more would keep online requests waiting."""
_FRESH_TOKENS = 16
"""A checkpoint is written once there are so many more."""
_READ_TOKENS = 256
"""Of running rows' answers, read for their checkpoints at a time: some two milliseconds of work."""
_READ_REST_S = 0.002
"""Then it is the turn of online requests."""
_KEPT_TOGETHER = 64
_OURS = Later(code=Code.INTERNAL, message="the gateway failed at it", is_engines=True)
_NOT_HERE = Later(code=Code.UNSUPPORTED, message="this gateway does not know its endpoint")
"""Newer ones do, while a fleet of gateways is upgraded."""
_NOBODYS_FAULT = Again(pause_us=0, blameless=True)


class Rows(Told, Protocol):
    """What of the store is needed here; the store itself has the contracts."""

    async def claim(self, room: int) -> list[Row]: ...
    async def overdue(self, rows: Iterable[Row]) -> list[Row]: ...
    async def keep_only(self, rows: Iterable[Row]) -> int: ...
    async def open_batches(self) -> list[Batch]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerRule:
    checkpoint_s: float = 5.0
    watch_s: float = 1.0
    """How soon rows are given up whose batch is cancelled."""
    pace: PaceRule = field(default_factory=PaceRule)


class Runner:
    """One for each gateway. Whatever fails here, online work goes on."""

    def __init__(
        self,
        store: Rows,
        bodies: Bodies,
        attempts: Attempts,
        runs: Callable[[str], bool],
        clock: Clock,
        unix_us: Callable[[], int],
        rng: Random,
        rule: RunnerRule,
    ) -> None:
        """`runs` says whether a job is at a server now."""
        self._store = store
        self._bodies = bodies
        self._attempts = attempts
        self._runs = runs
        self._clock = clock
        self._unix_us = unix_us
        self._rng = rng
        self._rule = rule
        self._pace = Pace(rule.pace)
        self._held: dict[tuple[int, int], Held] = {}
        self._ended: list[tuple[Held, Outcome]] = []
        self.tally = Tally()
        self._outbox = Outbox(store, self.tally, unix_us, self._forget)
        self._strikes = Strikes()
        self._absences = Absences()
        self._wake = asyncio.Event()
        self._epoch = 0
        """Of the lease: what was begun under an older one says nothing of this."""
        self._give_back_at_s: float | None = None
        self._troubled: set[str] = set()
        """What the store did not take, or tell, the last time."""
        self._is_behind = False
        """There is room for more rows than one turn has taken."""
        self._claim_in_doubt = False
        """The store may hold rows for us that it could not tell us of."""
        self.open_batches: Sequence[Batch] = ()
        """Of all gateways together, as they were some seconds ago."""

    def __len__(self) -> int:
        """Rows in memory."""
        return len(self._held)

    @property
    def running(self) -> int:
        return sum(map(self._is_running, self._held.values()))

    def poke(self) -> None:
        """There may be something to do: a batch has come, or one is to be cancelled."""
        self._wake.set()

    # Life.

    async def run(self) -> None:
        """Until it is told to stop; then all rows are back in the store, or with a lease that
        runs out. Leases themselves are kept elsewhere."""
        async with asyncio.TaskGroup() as group:
            beats = [
                group.create_task(self._every(self._rule.watch_s, "watch", self._watch)),
                group.create_task(self._every(self._rule.checkpoint_s, "keep", self._keep)),
                group.create_task(self._every(_SURVEY_S, "survey", self._survey)),
            ]
            while not self._is_over():
                if await self._guarded("turn", lambda: self._turn(group)):
                    await self._rest()
                else:
                    await pause(self._clock, _TROUBLE_S)
            await self._give_back()
            for beat in beats:
                beat.cancel()

    def drain(self, within_s: float) -> None:
        """Takes no more rows; those that have not ended by then are given back."""
        self._give_back_at_s = self._clock.time() + within_s
        self._wake.set()

    def hurry(self) -> None:
        self.drain(0.0)

    def lease_lost(self) -> None:
        """Others run our rows by now."""
        self._epoch += 1
        if self._held:
            self.tally.leases_lost += 1
        for held in list(self._held.values()):
            self._drop(held)
        self._ended = []
        self._outbox.clear()

    @property
    def _drains(self) -> bool:
        return self._give_back_at_s is not None

    def _is_over(self) -> bool:
        if self._give_back_at_s is None:
            return False
        is_idle = not self._held and not self._outbox
        return is_idle or self._clock.time() >= self._give_back_at_s

    async def _give_back(self) -> None:
        """Last words: a store that does not take them learns by the lease that runs out."""
        await self._guarded("turn", self._record)
        left = list(self._held.values())
        marks = marks_of(left, fresh_tokens=1)
        for held in left:
            self._drop(held)
        rows = [held.row for held in left]
        await self._guarded("keep", lambda: self._outbox.keep(marks))
        await self._guarded("turn", lambda: self._outbox.release(rows, _NOBODYS_FAULT))

    async def _every(self, seconds: float, name: str, do: Callable[[], Awaitable[None]]) -> None:
        while True:
            await pause(self._clock, seconds)
            await self._guarded(name, do)

    async def _guarded(self, name: str, do: Callable[[], Awaitable[object]]) -> bool:
        """Whether it went well. A store in trouble is told of once, and tried again; it may read
        while it cannot write, and works again once it does both."""
        epoch = self._epoch
        try:
            await do()
        except LeaseLost:
            if epoch == self._epoch:
                self.lease_lost()
            return False
        except StoreFault as fault:
            if not self._troubled:
                log.warning("the store of batches is in trouble", error=str(fault) or repr(fault))
            self._troubled.add(name)
            return False
        except Exception:  # the edge of this task: a bug must not end what serves online requests
            log.exception("rows of batches are in trouble")
            return False
        if name in self._troubled:
            self._troubled.remove(name)
            if not self._troubled:
                log.info("the store of batches works again")
        return True

    async def _rest(self) -> None:
        """A little after the first that ends, so that others can join it."""
        timer = self._clock.call_at(self._clock.time() + _TURN_S, self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._wake.clear()
        if not self._drains:
            await pause(self._clock, _BREATH_S if self._is_behind else _GATHER_S)

    # A turn: what has ended is recorded, and others take its place.

    async def _turn(self, group: asyncio.TaskGroup) -> None:
        await self._record()
        if not self._drains:
            await self._refill(group)

    async def _refill(self, group: asyncio.TaskGroup) -> None:
        now_us = self._now_us()
        waiting = len(self._held) - self.running
        room = self._pace.room(held=len(self._held), waiting=waiting, now_us=now_us)
        self._is_behind = False
        if not (room := min(room, _AT_ONCE)):
            return
        if self._claim_in_doubt:
            await self._store.keep_only([held.row for held in self._held.values()])
        self._claim_in_doubt = True
        epoch, rows = self._epoch, await self._store.claim(room)
        ready = [row for row in rows if not self._absences.pause_us(row.batch, now_us)]
        self._pace.took(len(rows) if ready else 0)
        bodies = await read(self._bodies, ready)
        if epoch != self._epoch:
            return
        self._put_back(row for row in rows if row not in ready)
        for row, body in zip(ready, bodies, strict=True):
            self._begin(row, body, group)
        self._claim_in_doubt = False
        self._is_behind = bool(ready) and len(rows) == _AT_ONCE
        if ready and len(rows) == room:
            self._wake.set()

    def _put_back(self, rows: Iterable[Row]) -> None:
        """Nobody has their model now, as others of their batch have been told."""
        for row in rows:
            self._held[row.key] = Held(row, "")
            self._outbox.add(row, self._waits_for_its_model(row))

    def _waits_for_its_model(self, row: Row) -> Again:
        pause_us = self._absences.pause_us(row.batch, self._now_us())
        return Again(pause_us=pause_us, blameless=True)

    def _begin(self, row: Row, body: bytes | Later, group: asyncio.TaskGroup) -> None:
        held = Held(row, f"{self._rng.getrandbits(128):032x}")
        held.kept_tokens = row.checkpoint_tokens
        self._held[row.key] = held
        if isinstance(body, Later):
            self._ended.append((held, body))
            self._wake.set()
        else:
            held.task = group.create_task(self._run_row(held, body))

    async def _run_row(self, held: Held, body: bytes) -> None:
        row = held.row

        @contextmanager
        def watch(visit: Visit) -> Iterator[None]:
            held.visit = visit
            yield

        outcome: Outcome = _NOT_HERE
        try:
            if (dialect := ROUTES.get(row.endpoint)) is not None:
                errand = self._errand(held, dialect, body)
                outcome = await self._attempts.answer(row.endpoint, errand, watch)
        except Exception:  # the edge of a row's task: the others must not suffer for it
            log.exception("a row failed", batch=row.batch_id, line=row.number)
            outcome = _OURS
        if self._held.get(row.key) is held:
            self._ended.append((held, outcome))
            self._wake.set()

    def _errand(self, held: Held, dialect: Dialect, body: bytes) -> Errand:
        row = held.row
        earlier = Checkpoint.of(row.checkpoint) if row.checkpoint else None
        if earlier is not None:
            self.tally.resumed += 1
        return Errand(
            request_id=held.request_id,
            tenant=row.tenant,
            dialect=dialect,
            body=body,
            due_us=self._now_us() + row.deadline_us - self._unix_us(),
            earlier=earlier,
        )

    # What the store is told.

    async def _record(self) -> None:
        ended, self._ended = self._ended, []
        for held, outcome in ended:
            if self._held.get(held.row.key) is held:
                self._outbox.add(held.row, self._judged(held, outcome))
        await self._outbox.flush()

    def _judged(self, held: Held, outcome: Outcome) -> Result | Again:
        """What cannot be written down is like what cannot be run: the others have their results."""
        try:
            return self._verdict(held, outcome)
        except Exception:  # whatever a server has said: it must not strand others
            row = held.row
            log.exception("an answer cannot be kept", batch=row.batch_id, line=row.number)
            return self._verdict(held, _OURS)

    def _verdict(self, held: Held, outcome: Outcome) -> Result | Again:
        row, is_last = held.row, False
        if isinstance(outcome, Later):
            self.tally.put_off(outcome.code)
            if outcome.code not in ABSENT:
                is_last = self._strikes.count(row, outcome)
            elif not (is_last := self._is_absent_for_good(row, outcome)):
                return self._waits_for_its_model(row)
        elif outcome.status < 400:
            self._absences.over(row.batch)
        told = verdict(row, outcome, held.request_id, is_last=is_last)
        self._set_pace(told, outcome)
        if isinstance(told, Result):
            self._strikes.forget(row)
        return told

    def _is_absent_for_good(self, row: Row, outcome: Later) -> bool:
        if row.batch not in self._absences:
            log.warning("a batch waits for its model", batch=row.batch_id, reason=outcome.message)
        return self._absences.met(row.batch, self._now_us())

    def _set_pace(self, told: Result | Again, outcome: Outcome) -> None:
        if isinstance(told, Result):
            self._pace.answered()
        elif told.blameless and not _is_too_late(outcome):
            self._pace.refused(self._now_us())

    def _forget(self, row: Row) -> None:
        held = self._held.get(row.key)
        if held is not None and held.row.fence == row.fence:
            del self._held[row.key]

    def _drop(self, held: Held) -> None:
        """Whatever it comes to, nobody wants it from us any more."""
        self._forget(held.row)
        self._strikes.forget(held.row)
        if held.task is not None:
            held.task.cancel()

    # Beside the turns.

    async def _watch(self) -> None:
        """Rows of batches that were cancelled, or whose window is over, leave their servers."""
        if not self._held:
            return
        found = await self._store.overdue([held.row for held in self._held.values()])
        told = self._outbox.finished()  # some have ended meanwhile
        over = [it for row in found if (it := self._held.get(row.key)) and row.key not in told]
        wasted: Counter[int] = Counter()
        for held in over:
            wasted[held.row.batch] += held.tokens
            self._drop(held)
            self._outbox.add(held.row, _NOBODYS_FAULT)
            self._wake.set()
        await self._outbox.waste(wasted)

    async def _survey(self) -> None:
        self.open_batches = await self._store.open_batches()
        open_ones = {batch.seq for batch in self.open_batches}
        self._strikes.keep_only(open_ones)
        self._absences.keep_only(open_ones)

    async def _keep(self) -> None:
        marks: list[Mark] = []
        read_tokens = 0
        for held in list(self._held.values()):
            if (taken := held.taken(_FRESH_TOKENS)) is None:
                continue
            marks.append((held, taken))
            read_tokens += taken.tokens - held.kept_tokens
            if len(marks) == _KEPT_TOGETHER:
                await self._outbox.keep(marks)
                marks.clear()
            if read_tokens >= _READ_TOKENS:
                await pause(self._clock, _READ_REST_S)
                read_tokens = 0
        await self._outbox.keep(marks)

    # Small questions.

    def _is_running(self, held: Held) -> bool:
        visit = held.visit
        return visit is not None and any(self._runs(part.job.id) for part in visit.parts)

    def _now_us(self) -> int:
        return round(self._clock.time() * 1e6)


def _is_too_late(outcome: Outcome) -> bool:
    """That says nothing of what servers can take."""
    return isinstance(outcome, Later) and outcome.code is Code.DEADLINE_PASSED
