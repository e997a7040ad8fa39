"""Which servers a job goes to: the best of those that may take it, found in one pass over each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from gateway.books import Candidates
from policies.admit import Admit
from policies.ledger import Ledger
from policies.place import Place
from policies.types import Job

Rank = Callable[[Job, Ledger], Any]
Admits = Callable[[Job, Ledger], bool]


def choose(
    job: Job,
    candidates: Candidates,
    *,
    admit: Admit,
    place: Place,
    avoid: Collection[str],
    now_us: int,
) -> tuple[Ledger, Ledger] | None:
    """A prefill and a decode server, or one unified server as both.

    Servers that have just failed this job are taken only when there is no other.
    """
    if avoid:
        others = candidates.without(avoid)
        pair = choose(job, others, admit=admit, place=place, avoid=(), now_us=now_us)
        if pair is not None:
            return pair

    def both(job: Job, ledger: Ledger) -> bool:
        return admit.prefill(job, ledger) and admit.decode(job, ledger)

    # Prefill first: it is what a queue mostly waits for, and there are fewer of them.
    prefill = best(job, candidates.prefills, place.prefill, admit.prefill, now_us)
    decode = None
    if prefill is not None:
        decode = best(job, candidates.decodes, place.decode, admit.decode, now_us)
    unified = best(job, candidates.unified, place.prefill, both, now_us)
    if prefill is None or decode is None:
        return None if unified is None else (unified, unified)
    if unified is not None and place.prefill(job, unified) < place.prefill(job, prefill):
        return unified, unified
    return prefill, decode


def best(
    job: Job, ledgers: Iterable[Ledger], rank: Rank, admits: Admits, now_us: int
) -> Ledger | None:
    """The lowest rank among those in rotation that admit the job; the first by name in a tie.

    Only a server that would be better than the best so far is asked whether it admits the job.
    """
    found: Ledger | None = None
    lowest: Any = None
    for ledger in ledgers:
        ranked = rank(job, ledger)
        if found is not None and not ranked < lowest:
            continue
        if ledger.usable(now_us) and admits(job, ledger):
            found, lowest = ledger, ranked
    return found
