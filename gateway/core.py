"""The scheduler as a state machine: events and the time in, decisions out, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.books import Candidates, Fleet, Lane, Ticket
from gateway.lifecycle import State, Step
from policies.admit import Admit, Headroom
from policies.breaker import BreakerRule
from policies.events import (
    Arrived,
    Cancel,
    Decision,
    Dispatch,
    Event,
    Fail,
    Failed,
    Finished,
    FirstToken,
    Freed,
    Left,
    LoadReport,
    PrefillDone,
    Progress,
    Reason,
    Reject,
    WakeAt,
    Wakeup,
    WorkerDown,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from policies.ledger import Ledger
from policies.order import Edf, Order
from policies.place import LeastWork, Place
from policies.pools import Pools, Shared
from policies.queue import KeyedHeap
from policies.retry import RetryBudget, RetryRule
from policies.types import Job, Kind, Role, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Every choice that the core leaves to policies; replaced whole by a reload."""

    order: Order = field(default_factory=Edf)
    place: Place = field(default_factory=LeastWork)
    admit: Admit = field(default_factory=Headroom)
    pools: Pools = field(default_factory=Shared)
    breaker: BreakerRule = field(default_factory=BreakerRule)
    retry: RetryRule = field(default_factory=RetryRule)
    max_queued: int = 10_000
    """Jobs of one kind that may wait for one model."""
    load_stale_us: int = 5_000_000


class Core:
    """Owns the queues and the books. One instant is one call."""

    def __init__(self, rules: Rules, workers: Iterable[Worker] = ()) -> None:
        self._rules = rules
        self._fleet = Fleet(rules.breaker, rules.pools)
        self._budget = RetryBudget(rules.retry)
        self._tickets: dict[str, Ticket] = {}
        self._lanes: dict[str, Lane] = {}
        self._give_up: KeyedHeap[tuple[int, ...]] = KeyedHeap()
        self._later: KeyedHeap[tuple[int, ...]] = KeyedHeap()
        self._alarm_us = 0
        self._fresh: list[Ticket] = []
        self._out: list[Decision] = []
        self._touched: dict[str, Lane] = {}
        self._on: dict[type[Event], Callable[[Any, int], None]] = {
            Arrived: self._arrived,
            Left: self._left,
            PrefillDone: self._prefill_done,
            FirstToken: self._first_token,
            Progress: self._progress,
            Finished: self._finished,
            Failed: self._failed,
            Freed: self._freed,
            LoadReport: self._load_report,
            WorkerUp: self._worker_up,
            WorkerDown: self._worker_down,
            WorkerDraining: self._worker_draining,
            WorkerGone: self._worker_gone,
            Wakeup: self._wakeup,
        }
        for worker in workers:
            self._fleet.add(worker)

    def handle(self, events: Sequence[Event], now_us: int) -> list[Decision]:
        for event in events:
            self._on[type(event)](event, now_us)
        if self._fresh:
            self._take_in(now_us)
        if self._give_up:  # all that wait, for a server or for their next attempt
            self._pass_time(now_us)
            lanes, self._touched = self._touched, {}
            for lane in lanes.values():
                self._dispatch(lane, now_us)
            self._set_alarm(now_us)
        decisions, self._out = self._out, []
        return decisions

    # What others may read.

    @property
    def ledgers(self) -> dict[str, Ledger]:
        return self._fleet.ledgers

    @property
    def retry_budget_tokens(self) -> float:
        return self._budget.tokens

    def queued(self, kind: Kind) -> int:
        return sum(len(lane.waiting[kind]) for lane in self._lanes.values())

    def placed(self, kind: Kind) -> int:
        return sum(t.is_placed and t.job.kind is kind for t in self._tickets.values())

    def __len__(self) -> int:
        """Jobs that have not ended, or whose legs have not."""
        return len(self._tickets)

    def adopt(self, rules: Rules) -> None:
        """Other policies from here on: what waits is keyed anew, what runs is left alone."""
        self._rules = rules
        self._fleet.adopt(rules.breaker, rules.pools)
        self._budget = RetryBudget(rules.retry)
        for lane in self._lanes.values():
            lane.candidates = {}
            for kind in Kind:
                for job_id in list(lane.waiting[kind]):
                    job = self._tickets[job_id].job
                    lane.take(job)
                    lane.put(job, rules.order.key(job))
            self._touched[lane.model] = lane

    # Jobs.

    def _arrived(self, event: Arrived, now_us: int) -> None:
        job = event.job
        self._tickets[job.id] = ticket = Ticket(job)
        self._fresh.append(ticket)
        self._budget.earn(job)

    def _take_in(self, now_us: int) -> None:
        """Those of one instant in their order. Where nobody waits, the queue is spared."""
        fresh, self._fresh = self._fresh, []
        if len(fresh) > 1:
            key = self._rules.order.key
            fresh.sort(key=lambda t: (t.job.kind is Kind.OFFLINE, key(t.job), t.job.id))
        for ticket in fresh:
            if ticket.state is not State.QUEUED:  # its client left in the same instant
                continue
            lane = self._lane(ticket.job.model)
            if lane.is_quiet:
                pair = self._choose(ticket, self._candidates(lane, ticket.job.kind), now_us)
                if pair is not None:
                    self._place(ticket, *pair, now_us)
                    continue
            if (refusal := self._refusal(ticket.job, lane, now_us)) is not None:
                ticket.step(Step.REFUSED)
                self._out.append(refusal)
                del self._tickets[ticket.job.id]
            else:
                self._enqueue(ticket, lane)

    def _refusal(self, job: Job, lane: Lane, now_us: int) -> Reject | None:
        """What can be answered at once, before the job costs anything."""
        candidates = self._candidates(lane, job.kind)
        if not candidates.can_serve:
            return Reject(job, Reason.NO_WORKER)
        if not self._fits_ever(job, candidates):
            return Reject(job, Reason.TOO_LARGE)
        if job.kind is Kind.ONLINE and not candidates.usable(now_us):
            return Reject(job, Reason.UNAVAILABLE, self._reopens_in_us(candidates, now_us))
        waiting = lane.waiting[job.kind]
        if not waiting:
            return None
        wait_us = self._predicted_wait_us(lane, candidates)
        if len(waiting) >= self._rules.max_queued:
            return Reject(job, Reason.QUEUE_FULL, wait_us)
        is_last = self._rules.order.key(job) >= lane.last_key[job.kind]
        if job.kind is Kind.ONLINE and is_last and now_us + wait_us > job.give_up_us:
            return Reject(job, Reason.HOPELESS, now_us + wait_us - job.give_up_us)
        return None

    def _left(self, event: Left, now_us: int) -> None:
        ticket = self._tickets.get(event.job_id)
        if ticket is None or ticket.state is State.CANCELLED:
            return
        ticket.step(Step.CLIENT_LEFT)
        if ticket.is_placed:
            self._out.append(Cancel(ticket.job, Reason.CLIENT_LEFT))
        else:
            self._forget(ticket)

    def _prefill_done(self, event: PrefillDone, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is None or ticket.prefill is None:
            return
        if not ticket.prefill.breaker.is_closed:
            ticket.prefill.breaker.succeeded()
        if ticket.prefill is not ticket.decode:
            ticket.end_prefill(now_us)
            self._touch_all()

    def _first_token(self, event: FirstToken, now_us: int) -> None:
        ticket = self._tickets.get(event.job_id)
        if ticket is None or ticket.state is not State.PREFILL:
            return
        ticket.step(Step.FIRST_TOKEN)
        for ledger in (ticket.prefill, ticket.decode):
            if ledger is not None and not ledger.breaker.is_closed:
                ledger.breaker.succeeded()
        if ticket.prefill is not None:
            ticket.end_prefill(now_us)
            self._touch_all()

    def _progress(self, event: Progress, now_us: int) -> None:
        tickets = self._tickets
        for job_id, generated in event.tokens:
            if (ticket := tickets.get(job_id)) is not None:
                ticket.grow(generated)

    def _finished(self, event: Finished, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is None:
            return
        if ticket.state is not State.CANCELLED:
            ticket.step(Step.LAST_TOKEN)
        for ledger in (ticket.prefill, ticket.decode):
            if ledger is not None:
                ledger.breaker.succeeded()
        self._end(ticket, now_us)

    def _failed(self, event: Failed, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is None:
            return
        for ledger in (ticket.prefill, ticket.decode):
            if ledger is not None:
                ledger.breaker.gave_no_verdict()
        for name in event.blamed:
            if (blamed := self._fleet.ledgers.get(name)) is not None:
                blamed.breaker.failed(now_us)
        if ticket.state is State.CANCELLED:
            self._end(ticket, now_us)
            return
        ticket.release(now_us)
        self._touch_all()
        if (refusal := self._no_retry(ticket, event, now_us)) is not None:
            ticket.step(Step.BROKE)
            self._out.append(Fail(ticket.job, refusal, event.fault))
            self._forget(ticket)
        else:
            self._retry(ticket, event, now_us)

    def _no_retry(self, ticket: Ticket, event: Failed, now_us: int) -> Reason | None:
        if not event.restartable:
            return Reason.NOT_RESUMABLE
        return self._budget.refusal(ticket.job, ticket.attempt, event.fault, now_us)

    def _retry(self, ticket: Ticket, event: Failed, now_us: int) -> None:
        """The same job again; what it has generated is part of its prompt now."""
        job = ticket.job
        self._budget.spend(job)
        ticket.step(Step.RETRIED)
        ticket.avoid = event.blamed
        if event.generated:
            ticket.job = job._replace(
                prompt_tokens=job.prompt_tokens + event.generated,
                max_tokens=max(1, job.max_tokens - event.generated),
            )
        if delay_us := self._rules.retry.delay_us(job.kind, ticket.attempt):
            self._later.put(job.id, (now_us + delay_us,))
            self._give_up.put(job.id, (job.give_up_us,))
        else:
            self._enqueue(ticket, self._lane(job.model))

    def _freed(self, event: Freed, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is not None:
            for ledger in (ticket.prefill, ticket.decode):
                if ledger is not None:
                    ledger.breaker.gave_no_verdict()
            self._end(ticket, now_us)

    # Servers.

    def _load_report(self, event: LoadReport, now_us: int) -> None:
        if (ledger := self._fleet.ledgers.get(event.worker)) is not None:
            ledger.correct(event.load)
            self._touch_all()

    def _worker_up(self, event: WorkerUp, now_us: int) -> None:
        self._fleet.add(event.worker)
        self._fleet_changed()

    def _worker_down(self, event: WorkerDown, now_us: int) -> None:
        if (ledger := self._fleet.ledgers.get(event.name)) is not None:
            ledger.up = False
            ledger.forget_report()

    def _worker_draining(self, event: WorkerDraining, now_us: int) -> None:
        if (ledger := self._fleet.ledgers.get(event.name)) is not None:
            ledger.draining = True

    def _worker_gone(self, event: WorkerGone, now_us: int) -> None:
        """What runs there keeps its own reference to the ledger and ends as it would have."""
        if self._fleet.ledgers.pop(event.name, None) is not None:
            self._fleet_changed()
            self._reject_unservable()

    def _fleet_changed(self) -> None:
        for lane in self._lanes.values():
            lane.candidates = {}
        self._touch_all()

    def _reject_unservable(self) -> None:
        for lane in self._lanes.values():
            for kind in Kind:
                if lane.waiting[kind] and not self._candidates(lane, kind).can_serve:
                    for job_id in list(lane.waiting[kind]):
                        self._reject(self._tickets[job_id], Reason.NO_WORKER)

    # Time.

    def _wakeup(self, event: Wakeup, now_us: int) -> None:
        self._alarm_us = 0
        self._touch_all()

    def _pass_time(self, now_us: int) -> None:
        while (first := self._later.first_key()) is not None and first[0] <= now_us:
            ticket = self._tickets[self._later.pop()]
            self._enqueue(ticket, self._lane(ticket.job.model))
        while (first := self._give_up.first_key()) is not None and first[0] <= now_us:
            self._reject(self._tickets[self._give_up.pop()], Reason.EXPIRED)

    def _set_alarm(self, now_us: int) -> None:
        """Asks to be woken for the next deadline, retry or half-open breaker; not twice for one."""
        due: list[int] = [
            first[0]
            for heap in (self._later, self._give_up)
            if (first := heap.first_key()) is not None
        ]
        if not due:
            return
        due += [
            ledger.breaker.open_until_us
            for ledger in self._fleet.ledgers.values()
            if ledger.breaker.open_until_us > now_us
        ]
        if not now_us < self._alarm_us <= min(due):
            self._alarm_us = min(due)
            self._out.append(WakeAt(self._alarm_us))

    # Dispatch.

    def _dispatch(self, lane: Lane, now_us: int) -> None:
        """Online first; offline work goes only where no online job is left waiting."""
        for kind in (Kind.ONLINE, Kind.OFFLINE):
            waiting = lane.waiting[kind]
            while (job_id := waiting.peek()) is not None:
                ticket = self._tickets[job_id]
                pair = self._choose(ticket, self._candidates(lane, kind), now_us)
                if pair is None:
                    return
                lane.take(ticket.job)
                self._give_up.discard(job_id)
                self._place(ticket, *pair, now_us)

    def _choose(
        self, ticket: Ticket, candidates: Candidates, now_us: int
    ) -> tuple[Ledger, Ledger] | None:
        """A prefill and a decode server, or one unified server as both."""
        job, admit, place = ticket.job, self._rules.admit, self._rules.place
        prefills: list[Ledger] = []
        decode = None
        if candidates.unified:
            unified = self._open(candidates.unified, ticket, now_us)
            prefills = [e for e in unified if admit.decode(job, e)]
        if candidates.decodes:
            decodes = self._open(candidates.decodes, ticket, now_us)
            decode = self._best(job, [e for e in decodes if admit.decode(job, e)], place.decode)
            if decode is not None:
                prefills = prefills + self._open(candidates.prefills, ticket, now_us)
        prefill = self._best(job, [e for e in prefills if admit.prefill(job, e)], place.prefill)
        if prefill is None:
            return None
        if decode is None or prefill.worker.role is Role.UNIFIED:
            return prefill, prefill
        return prefill, decode

    @staticmethod
    def _open(ledgers: list[Ledger], ticket: Ticket, now_us: int) -> list[Ledger]:
        """Those in rotation; one that has just failed this job only when there is no other."""
        usable = [ledger for ledger in ledgers if ledger.usable(now_us)]
        if ticket.avoid:
            return [e for e in usable if e.worker.name not in ticket.avoid] or usable
        return usable

    @staticmethod
    def _best(
        job: Job, ledgers: list[Ledger], rank: Callable[[Job, Ledger], tuple[float, ...]]
    ) -> Ledger | None:
        if len(ledgers) < 2:
            return ledgers[0] if ledgers else None
        return min(ledgers, key=lambda ledger: (rank(job, ledger), ledger.worker.name))

    def _place(self, ticket: Ticket, prefill: Ledger, decode: Ledger, now_us: int) -> None:
        """Booked in the step that decides, so that the next decision sees it."""
        ticket.step(Step.DISPATCHED)
        ticket.book(prefill, decode, self._rules.admit.reserved(ticket.job), now_us)
        ticket.attempt += 1
        self._out.append(
            Dispatch(
                ticket.job,
                None if prefill is decode else prefill.worker.name,
                decode.worker.name,
                ticket.attempt,
                Reason.LEAST_WORK if ticket.attempt == 1 else Reason.RETRY,
            )
        )

    def _enqueue(self, ticket: Ticket, lane: Lane) -> None:
        lane.put(ticket.job, self._rules.order.key(ticket.job))
        self._give_up.put(ticket.job.id, (ticket.job.give_up_us,))
        self._touched[lane.model] = lane

    # Small questions.

    def _lane(self, model: str) -> Lane:
        lane = self._lanes.get(model)
        if lane is None:
            lane = self._lanes[model] = Lane(model)
        return lane

    def _candidates(self, lane: Lane, kind: Kind) -> Candidates:
        candidates = lane.candidates.get(kind)
        if candidates is None:
            candidates = lane.candidates[kind] = self._fleet.candidates(lane.model, kind)
        return candidates

    def _fits_ever(self, job: Job, candidates: Candidates) -> bool:
        holders = candidates.decodes + candidates.unified
        return any(self._rules.admit.fits_ever(job, ledger) for ledger in holders)

    @staticmethod
    def _reopens_in_us(candidates: Candidates, now_us: int) -> int:
        ledgers = candidates.prefills + candidates.decodes + candidates.unified
        due = [e.breaker.open_until_us - now_us for e in ledgers if not e.breaker.is_closed]
        return max(0, min(due, default=0))

    @staticmethod
    def _predicted_wait_us(lane: Lane, candidates: Candidates) -> int:
        """How long the last prompt in the queue waits at the rate seen; 0 while none was seen."""
        ledgers = candidates.prefills + candidates.unified
        rates = [rate for e in ledgers if (rate := e.prefill_rate.tokens_per_us) is not None]
        if not rates:
            return 0
        outstanding = sum(ledger.prefill_tokens for ledger in ledgers)
        return round((lane.waiting_tokens + outstanding) / sum(rates))

    def _reject(self, ticket: Ticket, reason: Reason) -> None:
        lane = self._lane(ticket.job.model)
        lane.take(ticket.job)
        ticket.step(Step.REFUSED)
        wait_us = self._predicted_wait_us(lane, self._candidates(lane, ticket.job.kind))
        self._out.append(Reject(ticket.job, reason, wait_us))
        self._forget(ticket)

    def _end(self, ticket: Ticket, now_us: int) -> None:
        ticket.release(now_us)
        self._touch_all()
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        job = ticket.job
        self._tickets.pop(job.id, None)
        if ticket.state in (State.REJECTED, State.CANCELLED):
            self._later.discard(job.id)
            self._give_up.discard(job.id)
            self._lane(job.model).take(job)

    def _touch_all(self) -> None:
        """Something was freed: lanes share servers, so all that wait look again."""
        if self._give_up:
            self._touched = {lane.model: lane for lane in self._lanes.values() if not lane.is_quiet}
