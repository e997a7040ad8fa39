"""Which of the queued jobs go to servers now, which wait, and who makes room for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gateway.accounts import Accounts
from gateway.agenda import Agenda
from gateway.books import Lane, Ticket
from gateway.choice import Pair, choose, fits_ever, is_held, is_worth_a_wait, without_failed
from gateway.lanes import Lanes
from gateway.lifecycle import Step
from gateway.neighbours import Neighbours
from gateway.preemption import Preemptor
from gateway.rules import Rules
from gateway.servers import Candidates
from gateway.slicing import Slicing
from gateway.underway import Underway
from gateway.unshown import Unshown
from policies.events import Decision, Dispatch, Preempt, Reason
from policies.hold import held_until_us
from policies.ledger import Ledger
from policies.order import NO_OUTLOOK
from policies.types import Job, Kind

_MOST_HELD = 4
"""Parts of prompts that others may overtake at one look: the bound on its work."""
# CPython 3.11 looks an enum's member up in Python, which costs as much as a call.
_ONLINE, _OFFLINE = Kind.ONLINE, Kind.OFFLINE
_DISPATCHED, _LEAST_WORK = Step.DISPATCHED, Reason.LEAST_WORK


class Sender:
    """Looks at a queue when something has changed for it, and keeps its order."""

    def __init__(
        self,
        rules: Rules,
        tickets: Mapping[str, Ticket],
        lanes: Lanes,
        agenda: Agenda,
        preemptor: Preemptor,
        neighbours: Neighbours,
        accounts: Accounts,
        say: Callable[[Decision], None],
        reject: Callable[[Ticket, Reason, int], None],
    ) -> None:
        self.rules = rules
        self._tickets = tickets
        self._lanes = lanes
        self._agenda = agenda
        self._preemptor = preemptor
        self._neighbours = neighbours
        self._accounts = accounts
        self._say = say
        self._reject = reject
        self._underway = Underway()
        self.unshown = Unshown()
        self.slicing = Slicing()

    def goes_at_once(self, ticket: Ticket, lane: Lane, now_us: int) -> bool:
        kind = ticket.job.kind
        if kind is _OFFLINE and (
            self._lanes.shut_out(lane, kind, now_us) or not self._may_send(lane, now_us)
        ):
            return False
        candidates = self._lanes.candidates(lane, kind, now_us)
        if self.rules.gather.holds and self._lanes.holds(ticket.job, lane, self._agenda, now_us):
            return False
        pair = self._choose(ticket, candidates, now_us)
        if pair is None:
            return False
        lane.open_bucket(kind, self._agenda, now_us)
        self._place(ticket, *pair, now_us)
        return True

    def enqueue(self, ticket: Ticket, lane: Lane, now_us: int) -> None:
        job, agenda, order = ticket.job, self._agenda, self.rules.order
        outlook = self._lanes.outlook(lane, job.kind, now_us) if order.moves else NO_OUTLOOK
        lane.put(job, order, outlook)
        agenda.put(agenda.give_up, job.id, job.give_up_us)
        if lane.waiting[job.kind].peek() == job.id or self.rules.holds_back:
            # Behind another it changes nothing: whoever is first was looked at already. Unless
            # that one waits for company, or until others can bear it.
            self._lanes.touch(lane)

    def dispatch(self, now_us: int) -> None:
        """Online first, over all models; offline work goes where no online job is left waiting."""
        lanes = self._lanes.taken()
        for lane in lanes:
            if lane.online.entries:
                self._fill(lane, _ONLINE, now_us)
        for lane in lanes:
            if lane.queued(_OFFLINE):
                self._turn_away(lane, now_us)
            if lane.offline.entries and self._may_send(lane, now_us):
                self._fill(lane, _OFFLINE, now_us)

    def _may_send(self, lane: Lane, now_us: int) -> bool:
        """Whether offline work may go at all."""
        lanes = self._lanes
        return not (lanes.online_waits_beside(lane) or lanes.keeps_waiting(lane, _OFFLINE, now_us))

    def _turn_away(self, lane: Lane, now_us: int) -> None:
        """All offline work that waits, also where online work would go first."""
        if (reason := self._lanes.shut_out(lane, _OFFLINE, now_us)) is not None:
            for job_id in lane.jobs(_OFFLINE):
                self._reject(self._tickets[job_id], reason, now_us)

    def _fill(self, lane: Lane, kind: Kind, now_us: int) -> None:
        held: list[Job] = []
        self._send_first(lane, kind, held, now_us)
        for job in held:
            outlook = self._lanes.outlook(lane, kind, now_us)
            lane.put(job, self.rules.order, outlook)

    def _send_first(self, lane: Lane, kind: Kind, held: list[Job], now_us: int) -> None:
        """Until the first job has to wait for what runs; the order is kept.

        One that waits for a turn of its own is held, and others are looked at.
        """
        order = self.rules.order
        candidates, outlook = self._lanes.candidates(lane, kind, now_us), NO_OUTLOOK
        free = candidates
        if order.moves:
            outlook = self._lanes.outlook(lane, kind, now_us)
            lane.rekey(kind, order, outlook)
        while (job_id := lane.first(kind, order, outlook)) is not None:
            ticket = self._tickets[job_id]
            job = ticket.job
            if self.rules.gather.holds and self._lanes.holds(job, lane, self._agenda, now_us):
                return
            pair = self._choose(ticket, free, now_us)
            if pair is not None:
                lane.take(job)
                lane.open_bucket(kind, self._agenda, now_us)
                self._agenda.forget(job_id)
                self._place(ticket, *pair, now_us)
            elif ticket.stands_aside and len(held) < _MOST_HELD:
                lane.take(job)
                held.append(job)
                free = free.without_prefill(ticket.waits_for)
            elif not self._passes_over(ticket, lane, candidates, now_us):
                return

    def _passes_over(self, ticket: Ticket, lane: Lane, candidates: Candidates, now_us: int) -> bool:
        """Whether the next one may be looked at: this one waits for no server that is there."""
        job, admit = ticket.job, self.rules.admit
        if is_worth_a_wait(job, candidates, admit, now_us):
            if job.kind is _ONLINE:
                self._make_room(ticket, lane, candidates, now_us)
            return False
        if not candidates.can_serve and self.rules.pools.holds(job.kind):
            return False
        if not candidates.can_serve:
            self._reject(ticket, Reason.NO_WORKER, now_us)
        elif not fits_ever(job, candidates, admit):
            self._reject(ticket, Reason.TOO_LARGE, now_us)
        elif candidates.in_rotation(now_us).can_serve:
            lane.set_aside(job)
        else:
            return False
        return True

    def _make_room(self, ticket: Ticket, lane: Lane, candidates: Candidates, now_us: int) -> None:
        """The first of the queue has to wait: for offline work, or for a long prompt behind it."""
        rules = self.rules
        self._preemptor.make_room(ticket, candidates, rules.admit, now_us)
        if not rules.displace.least_chunks:
            return
        outlook = self._lanes.outlook(lane, _ONLINE, now_us)
        found = self._underway.victim(ticket.job, candidates, rules.displace, rules.order, outlook)
        if found is not None:
            victim, job = found
            worker = self._accounts.took(victim, victim.prefill, Reason.DISPLACED)
            victim.makes_way(job)
            self._say(Preempt(job, Reason.DISPLACED, worker))

    def _choose(self, ticket: Ticket, candidates: Candidates, now_us: int) -> Pair | None:
        job = ticket.job
        ticket.upto, ticket.waits_for, ticket.stands_aside = 0, "", False
        if ticket.avoid:
            if pair := self._beyond_its_pool(ticket, candidates, now_us):
                return pair
            admit = self.rules.admit
            candidates = without_failed(job, candidates, ticket.avoid, admit, now_us)
        if ticket.leaves:
            others = candidates.without((ticket.leaves,))
            if pair := choose(job, others, self.rules, now_us):
                return pair
        pair = self._pick(ticket, candidates, now_us)
        if pair is None and is_held(job, candidates, self.rules, now_us):
            ticket.stands_aside = True
            self._agenda.put(self._agenda.held, job.id, held_until_us(job))
        return pair

    def _pick(self, ticket: Ticket, candidates: Candidates, now_us: int) -> Pair | None:
        if self.rules.displace.parts:
            return self.slicing.choose(ticket, candidates, self.rules, now_us)
        return choose(ticket.job, candidates, self.rules, now_us)

    def _beyond_its_pool(self, ticket: Ticket, candidates: Candidates, now_us: int) -> Pair | None:
        """Online work goes again at once, which would use up its attempts at the same server: where
        all of its pool have failed it, it goes to others that have room."""
        job, avoid = ticket.job, ticket.avoid
        if job.kind is _OFFLINE:
            return None
        if is_worth_a_wait(job, candidates.apart_from(avoid), self.rules.admit, now_us):
            return None
        everybody = self._lanes.everybody(self._lanes.of(job.model))
        pair = self._pick(ticket, everybody.apart_from(avoid), now_us)
        if pair is None:
            ticket.upto, ticket.waits_for, ticket.stands_aside = 0, "", False
        return pair

    def _place(self, ticket: Ticket, prefill: Ledger, decode: Ledger, now_us: int) -> None:
        """Booked in the step that decides, so that the next decision sees it."""
        ticket.step(_DISPATCHED)
        ticket.book(prefill, decode, self.rules.admit.reserved(ticket.sent_job), now_us)
        if ticket.upto:
            self.slicing.sent(ticket)
        if least_chunks := self.rules.displace.least_chunks:
            self._underway.sent(ticket, prefill, least_chunks)
        if prefill is decode:
            self.unshown.sent(ticket, prefill)
        ticket.attempt += 1
        reason = _LEAST_WORK
        if ticket.attempt > 1 or ticket.preemptions:
            reason = ticket.why_again
        elif ticket.parts:
            reason = Reason.NEXT_PART
        computes = None if prefill is decode else prefill.worker.name
        name, attempt = decode.worker.name, ticket.attempt
        self._say(Dispatch(ticket.job, computes, name, attempt, reason, ticket.upto))
        if ticket.job.kind is _OFFLINE:
            self._preemptor.placed(ticket)
            return
        if prefill.shares or decode.shares:
            self._neighbours.sent(ticket, prefill, now_us)
        if prefill.offline.prefills or decode.offline.decodes:
            self._preemptor.make_way(ticket, now_us)
