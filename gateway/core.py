"""The scheduler as a state machine: events and the time in, decisions out, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.accounts import Accounts
from gateway.agenda import Agenda, passed
from gateway.books import Ticket
from gateway.lanes import Lanes
from gateway.lifecycle import State, Step
from gateway.neighbours import Neighbours
from gateway.preemption import Preemptor
from gateway.rules import Rules
from gateway.sending import Sender
from gateway.servers import Fleet
from gateway.switching import Switching
from policies.events import (
    Arrived,
    Cancel,
    Decision,
    Event,
    Fail,
    Failed,
    Finished,
    FirstToken,
    Freed,
    Left,
    Load,
    LoadReport,
    PartDone,
    PauseRefused,
    Preempt,
    Preempted,
    PrefillDone,
    Progress,
    Reason,
    Recall,
    Reject,
    RoleSwitched,
    StepsSeen,
    SwitchWanted,
    WakeAt,
    Wakeup,
    WorkerDown,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from policies.ledger import Ledger
from policies.preempt import AbortBudget
from policies.retry import RetryBudget, continued
from policies.types import Kind, Pool, Role, Worker

__all__ = ["Core", "Rules"]

_REPORT_LAG_US = 500_000
"""What was sent this long before a report must be in it."""
# CPython 3.11 looks an enum's member up in Python, which costs as much as a call.
_ONLINE, _OFFLINE = Kind.ONLINE, Kind.OFFLINE
_QUEUED, _PREFILL, _CANCELLED = State.QUEUED, State.PREFILL, State.CANCELLED
_FIRST_TOKEN, _LAST_TOKEN = Step.FIRST_TOKEN, Step.LAST_TOKEN
_ENDED_UNPLACED = (State.REJECTED, State.CANCELLED)


class Core:
    """Owns the queues and the books. One instant is one call."""

    def __init__(self, rules: Rules, workers: Iterable[Worker] = ()) -> None:
        self._rules = rules
        self._fleet = Fleet(rules.breaker, rules.pools, rules.costs)
        self._budget = RetryBudget(rules.retry)
        self._tickets: dict[str, Ticket] = {}
        self._agenda = Agenda()
        self._fresh: list[Ticket] = []
        self._out: list[Decision] = []
        self._lanes = Lanes(rules, self._fleet, lambda job_id: self._tickets[job_id].job)
        self.accounts = Accounts()
        self._preemptor = Preemptor(rules.give_way, rules.aborts, self._take_off)
        self._neighbours = Neighbours(
            self._fleet,
            rules.standstill,
            self._preemptor,
            self._agenda,
            self._lanes.touch_all,
            self._say,
        )
        self._sender = Sender(
            rules,
            self._tickets,
            self._lanes,
            self._agenda,
            self._preemptor,
            self._neighbours,
            self.accounts,
            self._say,
            self._reject,
        )
        self.switching = Switching(
            self._fleet,
            rules.switch,
            self._recall,
            self._lanes.forget_candidates,
            self._say,
        )
        self._on = self._handlers()
        for worker in workers:
            self._fleet.add(worker)
        self._neighbours.regroup()

    def _handlers(self) -> dict[type[Event], Callable[[Any, int], None]]:
        return {
            Arrived: self._arrived,
            Left: self._left,
            PrefillDone: self._prefill_done,
            FirstToken: self._first_token,
            Progress: self._progress,
            Finished: self._finished,
            Failed: self._failed,
            Freed: self._freed,
            Recall: self._recall,
            Preempted: self._preempted,
            PartDone: self._part_done,
            LoadReport: self._load_report,
            StepsSeen: self._fleet.stepped,
            WorkerUp: self._worker_up,
            WorkerDown: self._worker_down,
            WorkerDraining: self._worker_draining,
            WorkerGone: self._worker_gone,
            SwitchWanted: self.switching.begin,
            RoleSwitched: self.switching.ended,
            PauseRefused: self._neighbours.refused,
            Wakeup: self._wakeup,
        }

    def handle(self, events: Sequence[Event], now_us: int) -> list[Decision]:
        if now_us >= self._fleet.stale_us and self._fleet.forget_stale(now_us):
            self._lanes.touch_all()
        for event in events:
            self._on[type(event)](event, now_us)
        if self.switching.moves:
            self.switching.advance(self._tickets.values(), now_us)
        self._neighbours.look(now_us)
        if self._fresh:
            self._take_in(now_us)
        agenda = self._agenda
        if agenda.give_up.entries:  # all that wait, for a server or for their next attempt
            if now_us >= agenda.alarm_us:
                self._pass_time(now_us)
            if self._lanes.look:
                self._sender.dispatch(now_us)
        if agenda.give_up.entries or self._neighbours.gpus:
            self._look_ahead(now_us)
        decisions, self._out = self._out, []
        return decisions

    # What others may read.

    @property
    def ledgers(self) -> dict[str, Ledger]:
        return self._fleet.ledgers

    @property
    def abort_budget(self) -> AbortBudget:
        return self._preemptor.budget

    @property
    def retry_budget_tokens(self) -> float:
        return self._budget.tokens

    def queued(self, kind: Kind) -> int:
        return self._lanes.queued(kind)

    def placed(self, kind: Kind) -> int:
        return sum(t.is_placed and t.job.kind is kind for t in self._tickets.values())

    def __len__(self) -> int:
        """Jobs that have not ended, or whose legs have not."""
        return len(self._tickets)

    def adopt(self, rules: Rules) -> None:
        """Other policies from here on: what waits is keyed anew, what runs is left alone."""
        self._rules = rules
        self._fleet.adopt(rules.breaker, rules.pools, rules.costs)
        self._budget.adopt(rules.retry)
        self._preemptor.adopt(rules.give_way, rules.aborts)
        self.switching.rule = rules.switch
        self._sender.rules = rules
        self._neighbours.rule = rules.standstill
        self._lanes.adopt(rules)

    # Jobs.

    def _arrived(self, event: Arrived, now_us: int) -> None:
        self._tickets[event.job.id] = ticket = Ticket(event.job)
        self._fresh.append(ticket)
        if event.job.kind is _ONLINE and self._rules.displace.parts:
            self._sender.slicing.came(now_us)

    def _take_in(self, now_us: int) -> None:
        """Those of one instant in their order. Who would be first in the queue is spared it."""
        fresh, self._fresh = self._fresh, []
        if len(fresh) > 1:
            key = self._rules.order.key
            fresh.sort(key=lambda t: (t.job.kind is _OFFLINE, key(t.job), t.job.id))
        for ticket in fresh:
            if ticket.state is not _QUEUED:  # its client left in the same instant
                continue
            lane = self._lanes.of(ticket.job.model)
            is_first = lane.would_be_first(ticket.job, self._rules.order)
            if is_first and self._sender.goes_at_once(ticket, lane, now_us):
                self._budget.earn(ticket.job)
            elif (refusal := self._lanes.refusal(ticket.job, lane, now_us)) is not None:
                ticket.step(Step.REFUSED)
                self._out.append(refusal)
                del self._tickets[ticket.job.id]
            else:
                self._budget.earn(ticket.job)
                self._sender.enqueue(ticket, lane, now_us)

    def _left(self, event: Left, now_us: int) -> None:
        ticket = self._tickets.get(event.job_id)
        if ticket is None or ticket.state is State.CANCELLED:
            return
        ticket.step(Step.CLIENT_LEFT)
        if ticket.is_placed:
            self._out.append(Cancel(ticket.job, Reason.CLIENT_LEFT))
        else:
            self._forget(ticket)
            self._lanes.touch_all()

    def _prefill_done(self, event: PrefillDone, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is None or ticket.prefill is None:
            return
        if ticket.prefill is not ticket.decode:
            self._succeeded(ticket.prefill)
            ticket.prefilled(now_us)
            self._lanes.touch_all()

    def _first_token(self, event: FirstToken, now_us: int) -> None:
        ticket = self._tickets.get(event.job_id)
        if ticket is None or ticket.state is not _PREFILL:
            return
        ticket.step(_FIRST_TOKEN)
        ticket.first_us = now_us
        if ticket.prefill is not None and ticket.prefill is not ticket.decode:
            self._succeeded(ticket.prefill)
        if ticket.decode is not None and not ticket.decode.breaker.is_closed:
            self._succeeded(ticket.decode)
        if ticket.prefill is not None:
            ticket.prefilled(now_us)
            self._lanes.touch_all()

    def _progress(self, event: Progress, now_us: int) -> None:
        tickets = self._tickets
        for job_id, generated in event.tokens:
            if (ticket := tickets.get(job_id)) is not None:
                ticket.grow(generated, now_us)
        self._preemptor.shorten_all(self._fleet.ledgers.values(), now_us)

    def _finished(self, event: Finished, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is None:
            return
        if ticket.state is not _CANCELLED:
            ticket.step(_LAST_TOKEN)
        if ticket.prefill is not None:
            self._succeeded(ticket.prefill)
        if ticket.decode is not None:
            self._succeeded(ticket.decode)
        if ticket.job.kind is _OFFLINE:
            self._preemptor.ended(ticket, event.generated)
        self._end(ticket)

    def _failed(self, event: Failed, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is None:
            return
        self._end_trials(ticket)
        for name in event.blamed:
            if (blamed := self._fleet.ledgers.get(name)) is not None:
                blamed.breaker.failed(now_us)
                if not blamed.breaker.is_closed:
                    self._agenda.alarm_us = 0
                    self._lanes.reconsider()
        if ticket.state is State.CANCELLED:
            self._end(ticket)
            return
        ticket.release()
        self._lanes.touch_all()
        ticket.job = continued(ticket.job, event.generated, now_us)
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
        job = ticket.job
        self._budget.spend(job)
        ticket.step(Step.RETRIED)
        ticket.avoid += event.blamed
        ticket.resumes = event.generated > 0
        if delay_us := self._rules.retry.delay_us(job.kind, ticket.attempt):
            self._agenda.put(self._agenda.later, job.id, now_us + delay_us)
            self._agenda.put(self._agenda.give_up, job.id, job.give_up_us)
        else:
            self._sender.enqueue(ticket, self._lanes.of(job.model), now_us)

    def _freed(self, event: Freed, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is not None:
            self._end_trials(ticket)
            self._end(ticket)

    def _recall(self, event: Recall, now_us: int) -> None:
        if (ticket := self._tickets.get(event.job_id)) is not None and ticket.may_yield:
            self._take_off(ticket, event.reason)

    def _take_off(self, ticket: Ticket, reason: Reason, ledger: Ledger | None = None) -> None:
        ticket.step(Step.PREEMPTED)
        worker = self.accounts.took(ticket, ledger, reason)
        self._out.append(Preempt(ticket.job, reason, worker))

    def _preempted(self, event: Preempted, now_us: int) -> None:
        """Its place is free. Whatever ended the job meanwhile came first and stands."""
        if (ticket := self._tickets.get(event.job_id)) is None:
            return
        if ticket.state is State.CANCELLED:
            self._freed(Freed(event.job_id), now_us)
        elif ticket.state is State.YIELDING:
            self._end_trials(ticket)
            self.accounts.returned(ticket, event)
            ticket.returned(event.generated, now_us)
            self._lanes.touch_all()
            self._sender.enqueue(ticket, self._lanes.of(ticket.job.model), now_us)

    def _part_done(self, event: PartDone, now_us: int) -> None:
        """A part of a prompt is computed. The end that a client asked for is on its way."""
        ticket = self._tickets.get(event.job_id)
        if ticket is None or ticket.state is _CANCELLED:
            return
        if event.is_cut:
            self._sender.slicing.computed(ticket, now_us)
            for ledger in (ticket.prefill, ticket.decode):
                if ledger is not None:
                    self._succeeded(ledger)
            ticket.prefilled(now_us)
        self._end_trials(ticket)
        ticket.part_done(now_us, is_cut=event.is_cut, counted_tokens=event.prompt_tokens)
        self._lanes.touch_all()
        self._sender.enqueue(ticket, self._lanes.of(ticket.job.model), now_us)

    def _end_trials(self, ticket: Ticket) -> None:
        if ticket.trials:
            ticket.end_trials()
            self._lanes.reconsider()

    def _succeeded(self, ledger: Ledger) -> None:
        breaker = ledger.breaker
        was_open = breaker.open_until_us
        breaker.succeeded()
        if was_open:
            self._lanes.reconsider()

    # Servers.

    def _load_report(self, event: LoadReport, now_us: int) -> None:
        if (ledger := self._fleet.ledgers.get(event.worker)) is None:
            return
        capacity_tokens = ledger.kv_tokens
        stale_us = event.load.seen_us + self._rules.load_stale_us
        self._fleet.correct(ledger, event.load, stale_us)
        self._agenda.mind(stale_us)
        if ledger.worker.role is Role.UNIFIED and ledger.prefills:
            self._free_computed(ledger, event.load)
        if _may_lend(ledger.worker) and not self._lanes.offline_waits:
            self._preemptor.pull(ledger, self._fleet.ledgers.values(), self._rules.admit, now_us)
        if ledger.kv_tokens == capacity_tokens:
            self._lanes.touch_all()
        else:
            self._lanes.reconsider()

    def _free_computed(self, ledger: Ledger, load: Load) -> None:
        """A whole answer of a unified server shows no first token; that nothing waits shows it."""
        if load.waiting or load.waiting_uncached_tokens:
            return
        for ticket in self._sender.unshown.computed(ledger, load.seen_us - _REPORT_LAG_US):
            ticket.free_prefill()

    def _worker_up(self, event: WorkerUp, now_us: int) -> None:
        self._fleet.add(event.worker)
        self._neighbours.came(event.worker)
        self._lanes.forget_candidates()

    def _worker_down(self, event: WorkerDown, now_us: int) -> None:
        if self._fleet.silence(event.name):
            self._lanes.reconsider()

    def _worker_draining(self, event: WorkerDraining, now_us: int) -> None:
        if (ledger := self._fleet.ledgers.get(event.name)) is not None:
            ledger.draining = event.draining
            self._lanes.reconsider()

    def _worker_gone(self, event: WorkerGone, now_us: int) -> None:
        """What runs there keeps its own reference to the ledger and ends as it would have."""
        if self._fleet.remove(event.name):
            self._neighbours.regroup()
            self._lanes.forget_candidates()

    def _say(self, decision: Decision) -> None:
        self._out.append(decision)

    # Time.

    def _wakeup(self, event: Wakeup, now_us: int) -> None:
        self._look_again()

    def _look_again(self) -> None:
        self._agenda.alarm_us = 0
        if self._fleet.has_tripped:
            self._lanes.reconsider()
        else:
            self._lanes.touch_all()

    def _pass_time(self, now_us: int) -> None:
        if self._agenda.alarm_us:
            # Another event may come first at the time of the alarm, and move the alarm on.
            self._look_again()
        for job_id in passed(self._agenda.later, now_us):
            ticket = self._tickets[job_id]
            self._sender.enqueue(ticket, self._lanes.of(ticket.job.model), now_us)
        for _ in passed(self._agenda.held, now_us):
            self._lanes.touch_all()
        for job_id in passed(self._agenda.give_up, now_us):
            self._reject(self._tickets[job_id], Reason.EXPIRED, now_us)
            self._lanes.touch_all()

    def _look_ahead(self, now_us: int) -> None:
        if self._neighbours.is_asked:
            self._neighbours.look(now_us)
        agenda = self._agenda
        if now_us >= agenda.alarm_us and (agenda.give_up.entries or self._neighbours.due_us()):
            self._set_alarm(now_us)

    def _set_alarm(self, now_us: int) -> None:
        """Asks to be woken for the next moment at which a job that waits may go or must end."""
        others_us = self._fleet.changes_us(now_us) + self._neighbours.due_us()
        self._out.append(WakeAt(self._agenda.next_alarm(others_us)))

    # Small questions.

    def _reject(self, ticket: Ticket, reason: Reason, now_us: int) -> None:
        lane = self._lanes.of(ticket.job.model)
        lane.take(ticket.job)
        ticket.step(Step.REFUSED)
        wait_us = self._lanes.wait_us(lane, ticket.job.kind, now_us)
        self._out.append(Reject(ticket.job, reason, wait_us))
        self._forget(ticket)

    def _end(self, ticket: Ticket) -> None:
        ticket.release()
        self._forget(ticket)
        self._lanes.touch_all()

    def _forget(self, ticket: Ticket) -> None:
        job = ticket.job
        self._tickets.pop(job.id, None)
        if ticket.state in _ENDED_UNPLACED:
            self._agenda.forget(job.id)
            self._lanes.of(job.model).take(job)


def _may_lend(worker: Worker) -> bool:
    return worker.role is Role.DECODE and worker.pool is Pool.STRICT
