"""Which servers a job goes to now, and whether there is any point in waiting for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.books import Candidates
from policies.admit import Admit
from policies.ledger import Ledger
from policies.place import Place
from policies.types import Job

Pair = tuple[Ledger, Ledger]
"""A prefill and a decode server, or one unified server as both."""


def choose(
    job: Job, candidates: Candidates, admit: Admit, place: Place, now_us: int
) -> Pair | None:
    prefill = _best(job, candidates.prefills, place.prefill, admit.prefill, now_us)
    decode = None
    if prefill is not None:
        decode = _best(job, candidates.decodes, place.decode, admit.decode, now_us)
    options: list[Pair] = [
        (ledger, ledger)
        for ledger in candidates.unified
        if ledger.usable(now_us) and admit.prefill(job, ledger) and admit.decode(job, ledger)
    ]
    if prefill is not None and decode is not None:
        options.append((prefill, decode))
    if len(options) < 2:
        return options[0] if options else None
    return min(
        options,
        key=lambda pair: (
            place.prefill(job, pair[0]),
            place.decode(job, pair[1]),
            pair[0].worker.name,
        ),
    )


def _best(
    job: Job,
    ledgers: Iterable[Ledger],
    rank: Callable[[Job, Ledger], tuple[float, ...]],
    admits: Callable[[Job, Ledger], bool],
    now_us: int,
) -> Ledger | None:
    """The first by rank, then by name, that may take the job; the list is in order of names."""
    best: Ledger | None = None
    least: tuple[float, ...] = ()
    for ledger in ledgers:
        its = rank(job, ledger)  # the cheapest question first
        if (best is None or its < least) and ledger.usable(now_us) and admits(job, ledger):
            best, least = ledger, its
    return best


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
