"""Who gives way to online work, and when: the core's hand on offline jobs that run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.books import Ticket
from gateway.lifecycle import State
from gateway.servers import Candidates
from policies.admit import Admit
from policies.events import Reason
from policies.ledger import DISPLACES, SELECTS, Ledger
from policies.preempt import (
    AbortBudget,
    AbortRule,
    Ahead,
    GiveWay,
    Leaving,
    Need,
    Victim,
    Victims,
)
from policies.retry import continued
from policies.types import Job, Pool, Role

_WEIGHT = 0.05
LOOK_AGAIN_US = 5_000
"""Room for one online job is sought no more often than this."""
_FLOWS, _YIELDING = State.DECODE, State.YIELDING
Residents = dict[str, Ticket]


class Preemptor:
    """Knows the offline jobs of each server, and has them taken off by `take`."""

    def __init__(
        self, rule: GiveWay, aborts: AbortRule, take: Callable[[Ticket, Reason, Ledger], None]
    ) -> None:
        self._rule = rule
        self._aborts = aborts
        self._take = take
        self._residents: dict[Ledger, Residents] = {}
        self._answer_tokens = 0.0
        self._looks = 0
        self._looked: dict[Ledger, int] = {}
        """Relaxed servers, by the last look at who might be pulled from there."""
        self.budget = AbortBudget(aborts)

    def adopt(self, rule: GiveWay, aborts: AbortRule) -> None:
        self._rule, self._aborts = rule, aborts
        self.budget.adopt(aborts)

    def placed(self, ticket: Ticket) -> None:
        """An offline job has gone to its servers."""
        for ledger in (ticket.prefill, ticket.decode):
            if ledger is not None:
                if (here := self._residents.get(ledger)) is None:
                    self._forget_empty()
                    here = self._residents[ledger] = {}
                here[ticket.job.id] = ticket
                if len(here) > 64 + 2 * (ledger.offline.decodes + ledger.offline.prefills):
                    self._residents[ledger] = _present(ledger, here)

    def _forget_empty(self) -> None:
        """Servers come and go under new names for as long as the gateway runs."""
        known = self._residents.items()
        self._residents = {ledger: here for ledger, here in known if not ledger.is_empty}
        self._looked = {e: look for e, look in self._looked.items() if e in self._residents}

    # For whom.

    def make_way(self, ticket: Ticket, now_us: int) -> None:
        """For an online job that has just gone to its servers."""
        if not self._rule.acts:
            return
        prefill, decode = ticket.prefill, ticket.decode
        if prefill is not None and prefill.offline.prefills:
            self._clear(ticket, prefill, ticket.booked_prefill, now_us)
        if decode is not None and decode.offline.decodes:
            self.shorten(decode, now_us)

    def make_room(self, ticket: Ticket, candidates: Candidates, admit: Admit, now_us: int) -> None:
        """For an online job that nobody could take."""
        if (ticket.looked_us and now_us < ticket.looked_us + LOOK_AGAIN_US) or not self._rule.acts:
            return
        ticket.looked_us = now_us
        job = ticket.job
        prefills = [e for e in candidates.prefills + candidates.unified if e.usable(now_us)]
        if prefills and not any(admit.prefill(job, e) for e in prefills):
            crowded = [e for e in prefills if e.offline.prefills]
            if crowded:
                self._clear(ticket, min(crowded, key=_online_tokens), 0, now_us)
        decodes = [e for e in candidates.decodes + candidates.unified if e.usable(now_us)]
        if decodes and not any(admit.decode(job, e) for e in decodes):
            self._vacate(ticket, [e for e in decodes if e.offline.decodes], admit, now_us)

    def shorten_all(self, ledgers: Iterable[Ledger], now_us: int) -> None:
        for ledger in ledgers:
            if ledger.offline.decodes and ledger.online.count:
                self.shorten(ledger, now_us)

    def shorten(self, ledger: Ledger, now_us: int) -> None:
        """Where the steps are too long for the online jobs of a server."""
        if SELECTS in ledger.worker.engine or not self._rule.may_be_over(ledger):
            return
        victims, leaving = self._at(ledger)
        chosen = self._rule.over(ledger, leaving, victims)
        if chosen:
            ledger.online.forget_pace()
            self._take_all(ledger, chosen[: self._aborts.per_request], Reason.STEP_TIME, now_us)

    def empty(self, ledger: Ledger, now_us: int) -> None:
        """All that can go, as far as the budget goes: their server cannot work now."""
        victims, _ = self._at(ledger, prefilling=ledger.worker.role is Role.PREFILL)
        self._take_all(ledger, victims, Reason.STOOD_STILL, now_us)

    def pull(self, strict: Ledger, others: Iterable[Ledger], admit: Admit, now_us: int) -> None:
        """For a strict server with room while no offline job waits for it: one at a time.

        Of the servers where it may pay one is looked at, in turn: a look at all who are there
        costs more than anything else that a report asks for.
        """
        worth = [e for e in others if self._may_pull(strict, e) and e.usable(now_us)]
        if not worth:
            return
        relaxed = min(worth, key=lambda e: (self._looked.get(e, 0), e.worker.name))
        self._looks += 1
        self._looked[relaxed] = self._looks
        victims, _ = self._at(relaxed)
        if (best := self._rule.pull(strict, relaxed, victims)) is None:
            return
        ticket = self._residents[relaxed][best.job_id]
        if admit.decode(_as_is(ticket), strict):
            ticket.leaves = relaxed.worker.name
            self._take_all(relaxed, [best], Reason.PULLED, now_us)

    def _may_pull(self, strict: Ledger, relaxed: Ledger) -> bool:
        crowded = relaxed.offline.decodes > 1 and _may_take_over(strict, relaxed)
        return crowded and self._rule.may_pull(strict, relaxed)

    def ended(self, ticket: Ticket, generated: int) -> None:
        """How long answers of offline jobs turn out to be, for those that run."""
        tokens = ticket.made + max(generated, ticket.generated)
        known = self._answer_tokens or tokens
        self._answer_tokens = known + _WEIGHT * (tokens - known)

    # How.

    def _clear(self, ticket: Ticket, ledger: Ledger, own_tokens: int, now_us: int) -> None:
        if DISPLACES in ledger.worker.engine:
            return
        victims, leaving = self._at(ledger, prefilling=True)
        if not victims:
            return
        under_way = ledger.prefill_rate.under_way(now_us)
        outstanding = ledger.prefill_tokens - own_tokens - leaving.prefill_tokens
        ahead = Ahead(
            max(0.0, outstanding - under_way),
            under_way,
            ledger.prefill_tokens_per_us,
            ledger.chunk_tokens,
        )
        chosen = self._rule.for_prefill(ticket.job, ahead, victims, now_us)
        self._take_for(ticket, ledger, chosen, Reason.ONLINE_PREFILL, now_us)

    def _vacate(self, ticket: Ticket, ledgers: Iterable[Ledger], admit: Admit, now_us: int) -> None:
        """The server where the fewest have to go; none while enough are going already."""
        options: list[tuple[Victims, Ledger]] = []
        for ledger in ledgers:
            victims, leaving = self._at(ledger)
            seats, tokens = admit.lacks(ticket.job, ledger)
            need = Need(seats - leaving.jobs, tokens - leaving.reserved_tokens)
            if need.seats <= 0 and need.tokens <= 0:
                return
            if chosen := self._rule.for_decode(need, victims):
                options.append((chosen, ledger))
        if options:
            chosen, ledger = min(options, key=lambda it: len(it[0]))
            self._take_for(ticket, ledger, chosen, Reason.ONLINE_DECODE, now_us)

    def _take_for(
        self, ticket: Ticket, ledger: Ledger, chosen: Victims, reason: Reason, now_us: int
    ) -> None:
        chosen = chosen[: max(0, self._aborts.per_request - ticket.took)]
        ticket.took += self._take_all(ledger, chosen, reason, now_us)

    def _take_all(self, ledger: Ledger, chosen: Victims, reason: Reason, now_us: int) -> int:
        chosen = chosen[: self.budget.left(now_us)] if chosen else chosen
        for victim in chosen:
            self._take(self._residents[ledger][victim.job_id], reason, ledger)
        if chosen:
            self.budget.spend(len(chosen))
        return len(chosen)

    def _at(self, ledger: Ledger, *, prefilling: bool = False) -> tuple[Victims, Leaving]:
        """Those of a server's offline jobs that can be taken off, and what is leaving already."""
        here = self._residents[ledger] = _present(ledger, self._residents.get(ledger, {}))
        victims = []
        jobs = prefill_tokens = context_tokens = reserved_tokens = 0
        for ticket in here.values():
            if prefilling and ticket.prefill is not ledger:
                continue
            if not prefilling and ticket.decode is not ledger:
                continue
            if ticket.state is _YIELDING or ticket.state is State.CANCELLED:
                jobs += 1
                prefill_tokens += ticket.booked_prefill
                context_tokens += ticket.booked_context
                reserved_tokens += ticket.booked_reserved
            elif ticket.may_yield:
                victims.append(_seen(ticket, self._answer_tokens))
        return victims, Leaving(jobs, prefill_tokens, context_tokens, reserved_tokens)


def _present(ledger: Ledger, here: Residents) -> Residents:
    return {
        job_id: ticket
        for job_id, ticket in here.items()
        if ticket.prefill is ledger or ticket.decode is ledger
    }


def _as_is(ticket: Ticket) -> Job:
    """As it would have to be sent now."""
    return continued(ticket.job, ticket.generated, 0)


def _may_take_over(strict: Ledger, relaxed: Ledger) -> bool:
    one, other = strict.worker, relaxed.worker
    return other.pool is Pool.RELAXED and (one.model == other.model or not one.model)


def _seen(ticket: Ticket, answer_tokens: float) -> Victim:
    left_tokens = min(answer_tokens - ticket.made, ticket.job.max_tokens) - ticket.generated
    return Victim(
        job_id=ticket.job.id,
        prefill_tokens=ticket.booked_prefill if ticket.prefill is not None else 0,
        context_tokens=ticket.booked_context,
        reserved_tokens=ticket.booked_reserved,
        sent_us=ticket.sent_us,
        flows=ticket.state is _FLOWS,
        preemptions=ticket.preemptions,
        resume=ticket.job.resume,
        left_tokens=max(0.0, left_tokens),
    )


def _online_tokens(ledger: Ledger) -> tuple[int, str]:
    return ledger.prefill_tokens - ledger.offline.prefill_tokens, ledger.worker.name
