"""Which servers a job goes to now, whether there is any point in waiting for them, and how long."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from operator import itemgetter

from gateway.rules import Rules
from gateway.servers import Candidates
from policies.admit import Admit
from policies.events import Reason, Reject
from policies.hold import Never, held_until_us
from policies.ledger import Ledger
from policies.order import Outlook
from policies.place import Place
from policies.types import Job, Kind

Pair = tuple[Ledger, Ledger]
"""A prefill and a decode server, or one unified server as both."""


def choose(job: Job, candidates: Candidates, rules: Rules, now_us: int) -> Pair | None:
    admit, place = rules.admit, rules.place
    pair = _pair(job, candidates, rules, now_us)
    if not candidates.unified:
        return pair
    options: list[Pair] = [
        (ledger, ledger)
        for ledger in candidates.unified
        if ledger.takes(job, now_us) and admit.prefill(job, ledger) and admit.decode(job, ledger)
    ]
    is_whole = bool(options) and job.prompt_tokens <= rules.gather.whole_tokens
    if pair is not None and not is_whole:
        options.append(pair)
    if len(options) < 2:
        return options[0] if options else None
    return _shortest(job, options, place)


def _pair(job: Job, candidates: Candidates, rules: Rules, now_us: int) -> Pair | None:
    """Prefill first: while none is free, which is most of the time, decode is not looked at."""
    admit, place = rules.admit, rules.place
    free = [e for e in admit.prefills(job, candidates.prefills) if e.takes(job, now_us)]
    if rules.gather.holds:
        free = rules.gather.servers(job, free, now_us)
    if not free or not candidates.decodes:
        return None
    decodes = candidates.decodes
    if rules.hold.holds:
        first_us = _first_us(job, free, now_us)
        decodes = [e for e in decodes if rules.hold.bears(job, e, first_us, now_us)]
        if not decodes:
            return None
    decode = _decode(job, decodes, admit, place, now_us)
    if decode is None:
        return None
    if len(free) == 1:
        return free[0], decode
    ranks = place.prefill(job, free)
    return free[ranks.index(min(ranks))], decode


def _first_us(job: Job, free: list[Ledger], now_us: int) -> float:
    """When its prompt would be computed if it went now, as far as anybody can say."""
    return now_us + min(
        (e.prefill_tokens + e.uncached(job)) / rate if (rate := e.prefill_tokens_per_us) else 0.0
        for e in free
    )


def is_held(job: Job, candidates: Candidates, rules: Rules, now_us: int) -> bool:
    """Whether it would go if nobody had to bear it."""
    if not rules.hold.holds or now_us >= held_until_us(job):
        return False
    return choose(job, candidates, replace(rules, hold=Never()), now_us) is not None


def _decode(
    job: Job, ledgers: list[Ledger], admit: Admit, place: Place, now_us: int
) -> Ledger | None:
    """The first by rank, then by name, that may take the job; the list is in order of names."""
    ranks = place.decode(job, ledgers)
    first = ledgers[ranks.index(min(ranks))]
    if first.takes(job, now_us) and admit.decode(job, first):
        return first
    best, least = None, inf
    for ledger, rank in zip(ledgers, ranks, strict=True):
        if rank < least and admit.decode(job, ledger) and ledger.takes(job, now_us):
            best, least = ledger, rank
    return best


def _shortest(job: Job, options: list[Pair], place: Place) -> Pair:
    """By the wait for the first token, then for the others, then by name."""
    firsts = place.prefill(job, [prefill for prefill, _ in options])
    others = place.decode(job, [decode for _, decode in options])
    names = [prefill.worker.name for prefill, _ in options]
    return min(zip(firsts, others, names, options, strict=True), key=itemgetter(0, 1, 2))[3]


def fits_ever(job: Job, candidates: Candidates, admit: Admit) -> bool:
    """Whether the servers on the list could take the job if they were up and empty."""
    fits = admit.fits_ever
    if any(fits(job, e) for e in candidates.unified):
        return True
    return any(fits(job, e) for e in candidates.prefills) and any(
        fits(job, e) for e in candidates.decodes
    )


def is_worth_a_wait(job: Job, candidates: Candidates, admit: Admit, now_us: int) -> bool:
    """Whether servers in rotation could take the job once what runs there has ended."""
    return (
        _some(job, candidates.prefills, admit, now_us)
        and _some(job, candidates.decodes, admit, now_us)
    ) or _some(job, candidates.unified, admit, now_us)


def _some(job: Job, ledgers: list[Ledger], admit: Admit, now_us: int) -> bool:
    """A plain loop: nearly always the first one will do."""
    for ledger in ledgers:  # noqa: SIM110
        if ledger.usable(now_us) and admit.fits_ever(job, ledger):
            return True
    return False


def without_failed(
    job: Job, candidates: Candidates, avoid: tuple[str, ...], admit: Admit, now_us: int
) -> Candidates:
    """Those that have just failed this job are out, unless nothing else could ever take it."""
    others = candidates.without(avoid)
    return others if is_worth_a_wait(job, others, admit, now_us) else candidates


def outlook_of(candidates: Candidates, waiting_tokens: int, now_us: int) -> Outlook:
    """The pace of the servers in rotation, and what they and others have to do first."""
    servers, known, tokens_per_us = 0, 0, 0.0
    for ledger in (*candidates.prefills, *candidates.unified):
        if ledger.usable(now_us):
            servers += 1
            waiting_tokens += ledger.prefill_tokens
            rate = ledger.prefill_rate.tokens_per_us
            if rate is None:
                rate = ledger.prefill_tokens_per_us  # as predicted
            if rate is not None:
                known += 1
                tokens_per_us += rate
    return Outlook(now_us, tokens_per_us / max(1, known), max(1, servers), waiting_tokens)


def predicted_wait_us(
    candidates: Candidates, waiting_tokens: int, now_us: int, *, takes_back: bool = False
) -> int:
    """How long the prompts that wait keep the servers busy, at the rate seen or predicted; else 0.

    Servers that have not shown their rate are taken to be as fast as the others. Offline prompts
    keep nobody waiting who `takes_back` their place.
    """
    tokens, count, known, rates = waiting_tokens, 0, 0, 0.0
    for ledger in (*candidates.prefills, *candidates.unified):
        if not ledger.usable(now_us):
            continue
        count += 1
        tokens += ledger.prefill_tokens
        if takes_back:
            tokens -= ledger.offline.prefill_tokens
        if (rate := ledger.prefill_tokens_per_us) is not None:
            known += 1
            rates += rate
    return round(tokens * known / (rates * count)) if known else 0


def reopens_in_us(candidates: Candidates, now_us: int) -> int:
    """Until the first of the open breakers may be tried."""
    ledgers = candidates.prefills + candidates.decodes + candidates.unified
    due = [e.breaker.open_until_us - now_us for e in ledgers if not e.breaker.is_closed]
    return max(0, min(due, default=0))


def unserved(job: Job, candidates: Candidates, rules: Rules, now_us: int) -> Reject | None:
    """Nobody in rotation could ever take it: offline work waits for those that could."""
    is_offline = job.kind is Kind.OFFLINE
    if not candidates.can_serve:
        return None if rules.pools.holds(job.kind) else Reject(job, Reason.NO_WORKER)
    if not fits_ever(job, candidates, rules.admit):
        return Reject(job, Reason.TOO_LARGE)
    if is_offline:
        return None
    return Reject(job, Reason.UNAVAILABLE, reopens_in_us(candidates, now_us))
