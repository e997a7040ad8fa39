"""Which models have jobs waiting, for which servers, and whose queue is to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from gateway.agenda import Agenda
from gateway.books import Lane
from gateway.choice import (
    is_worth_a_wait,
    outlook_of,
    predicted_wait_us,
    reopens_in_us,
    unserved,
)
from gateway.rules import Rules
from gateway.servers import Candidates, Fleet
from policies.events import Reason, Reject
from policies.order import NO_OUTLOOK, Outlook
from policies.types import Job, Kind

_MAX_LANES = 64
"""Beyond this, lanes without jobs are dropped: clients may make model names up."""
_ONLINE, _OFFLINE = Kind.ONLINE, Kind.OFFLINE


class Lanes:
    """The lanes share servers: what frees one lets all look again."""

    def __init__(self, rules: Rules, fleet: Fleet, job_of: Callable[[str], Job]) -> None:
        self._rules = rules
        self._fleet = fleet
        self._job_of = job_of
        self._lanes: dict[str, Lane] = {}
        self._touched: dict[str, Lane] = {}
        self._all_look = False

    def adopt(self, rules: Rules) -> None:
        """What waits is keyed anew."""
        self._rules = rules
        for lane in self._lanes.values():
            for kind in Kind:
                self._queue_anew(lane, kind, lane.jobs(kind))
        self.forget_candidates()

    def of(self, model: str) -> Lane:
        lane = self._lanes.get(model)
        if lane is None:
            if len(self._lanes) >= _MAX_LANES:
                self._lanes = {name: old for name, old in self._lanes.items() if len(old)}
            lane = self._lanes[model] = Lane(model)
        return lane

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def queued(self, kind: Kind) -> int:
        return sum(lane.queued(kind) for lane in self._lanes.values())

    @property
    def offline_waits(self) -> bool:
        return any(lane.offline for lane in self._lanes.values())

    def online_waits_beside(self, lane: Lane) -> bool:
        """In this lane, or in one that uses the same servers."""
        if lane.online.entries:
            return True
        others = [other for other in self._lanes.values() if other.online.entries]
        if not others:
            return False
        return not lane.model or self._fleet.takes_any_model or any(not e.model for e in others)

    # Who looks again.

    @property
    def look(self) -> bool:
        return self._all_look or bool(self._touched)

    def touch(self, lane: Lane) -> None:
        self._touched[lane.model] = lane

    def touch_all(self) -> None:
        """Something was freed."""
        self._all_look = True

    def taken(self) -> Iterable[Lane]:
        """Those to look at; from here on only what is touched anew."""
        lanes = list((self._lanes if self._all_look else self._touched).values())
        self._touched, self._all_look = {}, False
        return lanes

    def reconsider(self) -> None:
        """Other servers may take now what none could: those set aside queue up again. One that is
        lost can be the last of its pool, whose jobs share the other one then."""
        for lane in self._lanes.values():
            for kind in Kind:
                self._queue_anew(lane, kind, list(lane.aside[kind]))
        self.touch_all()

    def _queue_anew(self, lane: Lane, kind: Kind, job_ids: list[str]) -> None:
        jobs = [self._job_of(job_id) for job_id in job_ids]
        for job in jobs:
            lane.take(job)
        for job in jobs:
            lane.put(job, self._rules.order, NO_OUTLOOK)

    # Which servers, and how long.

    def forget_candidates(self) -> None:
        """The fleet is another one, or its pools are."""
        for lane in self._lanes.values():
            lane.own, lane.all = {}, None
        self.reconsider()

    def candidates(self, lane: Lane, kind: Kind, now_us: int) -> Candidates:
        """A pool of which nobody is in rotation is no reason to refuse what another could take."""
        own = lane.own.get(kind)
        if own is None:
            own = lane.own[kind] = self._fleet.own(lane.model, kind)
        if own.pool.has_usable(now_us) or not self._rules.pools.shares(kind):
            return own.with_lent
        everybody = self.everybody(lane)
        return everybody if everybody.has_usable(now_us) else own.with_lent

    def everybody(self, lane: Lane) -> Candidates:
        if lane.all is None:
            lane.all = self._fleet.all_of(lane.model)
        return lane.all

    def shut_out(self, lane: Lane, kind: Kind, now_us: int) -> Reason | None:
        """Why nothing of this kind may wait here: nobody of its pool is in rotation."""
        if not self._rules.pools.refuses(kind):
            return None
        if self.candidates(lane, kind, now_us).has_relaxed(now_us):
            return None
        return Reason.NO_RELAXED if self.everybody(lane).can_serve else Reason.NO_WORKER

    def keeps_waiting(self, lane: Lane, kind: Kind, now_us: int) -> bool:
        """The same, where it waits until somebody is."""
        holds = self._rules.pools.holds(kind)
        return holds and not self.candidates(lane, kind, now_us).has_relaxed(now_us)

    def outlook(self, lane: Lane, kind: Kind, now_us: int) -> Outlook:
        """What lies before the first of the queue; online work lies before all offline work."""
        before = lane.waiting_tokens[_ONLINE] if kind is _OFFLINE else 0
        return outlook_of(self.candidates(lane, kind, now_us), before, now_us)

    def refusal(self, job: Job, lane: Lane, now_us: int) -> Reject | None:
        """What can be answered at once, before the job costs anything."""
        rules, kind = self._rules, job.kind
        candidates = self.candidates(lane, kind, now_us)
        if (reason := self.shut_out(lane, kind, now_us)) is not None:
            return Reject(job, reason, reopens_in_us(candidates, now_us))
        if not is_worth_a_wait(job, candidates, rules.admit, now_us):
            refusal = unserved(job, candidates, rules, now_us)
            if refusal is not None:
                return refusal
        if not (queued := lane.queued(kind)):
            return None
        if queued >= rules.max_queued:
            wait_us = predicted_wait_us(candidates, lane.tokens_before(kind), now_us)
            return Reject(job, Reason.QUEUE_FULL, wait_us)
        if kind is _OFFLINE or not lane.is_last(job, rules.order):
            return None
        wait_us = predicted_wait_us(
            candidates, lane.tokens_before(kind), now_us, takes_back=rules.takes_back
        )
        late_us = now_us + wait_us - job.give_up_us
        return Reject(job, Reason.HOPELESS, late_us) if late_us > 0 else None

    def holds(self, job: Job, lane: Lane, agenda: Agenda, now_us: int) -> bool:
        """The first of a queue, for others to go with it; until the agenda says."""
        kind, bucket = job.kind, lane.buckets[job.kind]
        if bucket.opened_us == now_us:
            return False
        since_us = now_us if bucket.since_us is None else bucket.since_us
        tokens = max(lane.waiting_tokens[kind], job.prompt_tokens)
        prefills = self.candidates(lane, kind, now_us).prefills
        due_us = self._rules.gather.due_us(job, since_us, tokens, prefills, now_us)
        if due_us:
            bucket.since_us = since_us
            agenda.put(agenda.held, f"{kind}/{lane.model}", due_us)
        return due_us > 0

    def wait_us(self, lane: Lane, kind: Kind, now_us: int) -> int:
        """For one more job of this kind, if it is the last."""
        candidates = self.candidates(lane, kind, now_us)
        return predicted_wait_us(candidates, lane.tokens_before(kind), now_us)
