"""Which servers a job goes to now, whether there is any point in waiting for them, and how long."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

from gateway.servers import Candidates
from policies.admit import Admit
from policies.ledger import Ledger
from policies.order import Outlook
from policies.place import Place
from policies.types import Job

Pair = tuple[Ledger, Ledger]
"""A prefill and a decode server, or one unified server as both."""


def choose(
    job: Job, candidates: Candidates, admit: Admit, place: Place, now_us: int
) -> Pair | None:
    prefill = _best(
        candidates.prefills,
        place.prefill(job, candidates.prefills),
        lambda ledger: ledger.usable(now_us) and admit.prefill(job, ledger),
    )
    decode = None
    if prefill is not None:
        decode = _best(
            candidates.decodes,
            place.decode(job, candidates.decodes),
            lambda ledger: ledger.usable(now_us) and admit.decode(job, ledger),
        )
    options: list[Pair] = [
        (ledger, ledger)
        for ledger in candidates.unified
        if ledger.usable(now_us) and admit.prefill(job, ledger) and admit.decode(job, ledger)
    ]
    if prefill is not None and decode is not None:
        options.append((prefill, decode))
    if len(options) < 2:
        return options[0] if options else None
    return _shortest(job, options, place)


def _shortest(job: Job, options: list[Pair], place: Place) -> Pair:
    """By the wait for the first token, then for the others, then by name."""
    firsts = place.prefill(job, [prefill for prefill, _ in options])
    others = place.decode(job, [decode for _, decode in options])
    names = [prefill.worker.name for prefill, _ in options]
    return min(zip(firsts, others, names, options, strict=True), key=itemgetter(0, 1, 2))[3]


def _best(
    ledgers: list[Ledger], ranks: list[float], may: Callable[[Ledger], bool]
) -> Ledger | None:
    """The first by rank, then by name, that may take the job; the list is in order of names."""
    if not ranks:
        return None
    first = ledgers[ranks.index(min(ranks))]
    if may(first):
        return first
    order = sorted(range(len(ledgers)), key=ranks.__getitem__)
    return next((ledgers[index] for index in order[1:] if may(ledgers[index])), None)


def fits_ever(job: Job, candidates: Candidates, admit: Admit) -> bool:
    """Whether the servers on the list could take the job if they were up and empty."""
    return _complete(candidates, lambda ledger: admit.fits_ever(job, ledger))


def is_worth_a_wait(job: Job, candidates: Candidates, admit: Admit, now_us: int) -> bool:
    """Whether servers in rotation could take the job once what runs there has ended."""
    return _complete(candidates, lambda e: e.usable(now_us) and admit.fits_ever(job, e))


def _complete(candidates: Candidates, wanted: Callable[[Ledger], bool]) -> bool:
    if any(map(wanted, candidates.unified)):
        return True
    return any(map(wanted, candidates.prefills)) and any(map(wanted, candidates.decodes))


def without_failed(
    job: Job, candidates: Candidates, avoid: tuple[str, ...], admit: Admit, now_us: int
) -> Candidates:
    """Those that have just failed this job are out, unless nothing else could ever take it."""
    others = candidates.without(avoid)
    return others if is_worth_a_wait(job, others, admit, now_us) else candidates


def outlook_of(candidates: Candidates, waiting_tokens: int, now_us: int) -> Outlook:
    """The pace of the servers in rotation, and what they and others have to do first."""
    servers, known, tokens_per_us = 0, 0, 0.0
    for ledger in candidates.prefills + candidates.unified:
        if ledger.usable(now_us):
            servers += 1
            waiting_tokens += ledger.prefill_tokens
            if (rate := ledger.prefill_tokens_per_us) is not None:
                known += 1
                tokens_per_us += rate
    return Outlook(now_us, tokens_per_us / max(1, known), max(1, servers), waiting_tokens)


def predicted_wait_us(candidates: Candidates, waiting_tokens: int, now_us: int) -> int:
    """How long the prompts that wait keep the servers busy, at the rate seen or predicted; else 0.

    Servers that have not shown their rate are taken to be as fast as the others.
    """
    usable = candidates.in_rotation(now_us)
    ledgers = usable.prefills + usable.unified
    rates = [rate for e in ledgers if (rate := e.prefill_tokens_per_us) is not None]
    if not rates:
        return 0
    tokens = waiting_tokens + sum(e.prefill_tokens for e in ledgers)
    return round(tokens * len(rates) / (sum(rates) * len(ledgers)))


def reopens_in_us(candidates: Candidates, now_us: int) -> int:
    """Until the first of the open breakers may be tried."""
    ledgers = candidates.prefills + candidates.decodes + candidates.unified
    due = [e.breaker.open_until_us - now_us for e in ledgers if not e.breaker.is_closed]
    return max(0, min(due, default=0))
