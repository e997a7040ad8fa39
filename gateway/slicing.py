"""Which prompts go out in parts, where each part goes, and how often more urgent work comes."""

from __future__ import annotations

from gateway.books import Ticket
from gateway.choice import Pair, choose
from gateway.rules import Rules
from gateway.servers import Candidates
from policies.displace import UNKNOWN_CHUNK_TOKENS, Work
from policies.ledger import Ledger
from policies.types import Job, Role

_GAP_WEIGHT = 1 / 32
"""Of the latest gap between two online requests in their mean."""
_TURN_WEIGHT = 1 / 8
_FORGETS = 1 / 1024
"""How soon parts are tried again, once they have been slow: by so much with each request."""


class Slicing:
    """One part at a time on each server: two long prompts in turns would both be late.

    A part leaves its tokens in the cache of whoever computed them, so the next one goes there. It
    waits for room there rather than have more computed again than it would wait for.
    """

    def __init__(self) -> None:
        self._out: dict[str, Ticket] = {}
        self._came_us = 0
        self._gap_us = 0.0
        self._turn_us = 0.0
        """What a part took beyond computing it and what was before it."""

    def came(self, now_us: int) -> None:
        """An online request."""
        if self._came_us:
            gap_us = now_us - self._came_us
            self._gap_us += _GAP_WEIGHT * (gap_us - self._gap_us) if self._gap_us else gap_us
        self._came_us = now_us
        self._turn_us -= _FORGETS * self._turn_us

    def arrivals_per_us(self, now_us: int) -> float:
        """None for longer than usual is news, too."""
        gap_us = max(self._gap_us, now_us - self._came_us) if self._gap_us else 0.0
        return 1 / gap_us if gap_us else 0.0

    def computed(self, ticket: Ticket, now_us: int) -> None:
        """A part is back. A slow network makes itself felt in that: each is sent with all that
        came before it."""
        if (ledger := ticket.sent_to) is not None and (rate := ledger.prefill_tokens_per_us):
            waited_us = now_us - ticket.sent_us - ticket.ahead_tokens / rate
            self._turn_us += _TURN_WEIGHT * (max(0.0, waited_us) - self._turn_us)

    def sent(self, ticket: Ticket) -> None:
        if ticket.part_on not in self._out:
            # Servers come and go under new names for as long as the gateway runs.
            self._out = {name: it for name, it in self._out.items() if it.part_on == name}
        self._out[ticket.part_on] = ticket

    def choose(
        self, ticket: Ticket, candidates: Candidates, rules: Rules, now_us: int
    ) -> Pair | None:
        """Where it goes now, with how much of it in the ticket; none: it waits."""
        job = ticket.job
        own = self._holder(job, candidates, now_us)
        if own is None:
            return self._send(ticket, _uncached(job), candidates, rules, now_us)
        here = candidates.only(lambda it: it is own or it.worker.role is Role.DECODE)
        if (pair := self._send(ticket, job, here, rules, now_us)) is not None:
            return pair
        if job.cached_tokens >= own.prefill_tokens:
            ticket.waits_for, ticket.stands_aside = own.worker.name, True
            return None
        others = candidates.only(lambda it: it is not own)
        return self._send(ticket, _uncached(job), others, rules, now_us)

    def _send(
        self, ticket: Ticket, job: Job, where: Candidates, rules: Rules, now_us: int
    ) -> Pair | None:
        ledgers = where.prefills + where.unified
        size = 0 if ticket.whole else rules.displace.part_tokens(self._work(job, ledgers, now_us))
        if not size:
            return choose(job, where, rules, now_us)
        upto = job.cached_tokens + size
        pages = max((it.worker.page_size for it in ledgers), default=1)
        part = job._replace(prompt_tokens=upto - upto % max(1, pages), max_tokens=1)
        free = where.only(lambda it: not self._has_part(it))
        pair = choose(part, free, rules, now_us)
        if pair is not None:
            ticket.upto = part.prompt_tokens
        else:
            ticket.stands_aside = not (free.prefills or free.unified)
        return pair

    def _work(self, job: Job, ledgers: list[Ledger], now_us: int) -> Work:
        chunks = [it.chunk_tokens or UNKNOWN_CHUNK_TOKENS for it in ledgers]
        chunk_tokens = min(chunks, default=UNKNOWN_CHUNK_TOKENS)
        rates = [rate for it in ledgers if (rate := it.prefill_tokens_per_us)]
        tokens_per_us = sum(rates) / len(rates) if rates else 0.0
        return Work(
            tokens=job.prompt_tokens - job.cached_tokens,
            chunk_tokens=chunk_tokens,
            tokens_per_us=tokens_per_us,
            arrivals_per_us=self.arrivals_per_us(now_us),
            has_begun=bool(job.cached_on),
            turn_us=self._turn_us,
        )

    def _has_part(self, ledger: Ledger) -> bool:
        """Until it is back in the queue, which is a moment after its prompt is computed."""
        name = ledger.worker.name
        return (ticket := self._out.get(name)) is not None and ticket.part_on == name

    @staticmethod
    def _holder(job: Job, candidates: Candidates, now_us: int) -> Ledger | None:
        for ledger in candidates.prefills + candidates.unified:
            if ledger.worker.name == job.cached_on and ledger.takes(job, now_us):
                return ledger
        return None


def _uncached(job: Job) -> Job:
    """To servers that have nothing of it."""
    return job._replace(cached_tokens=0, cached_on="") if job.cached_on else job
