"""What a run's requests add up to; computed from records and run facts alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway.simulation.records import Ended, Record, RunFacts
from policies.types import Kind

SHARES = tuple(i / 100 for i in range(101))
"""Where a distribution is kept for its plot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """By nearest rank; None where nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        ordered = sorted(values)
        return cls(p50=rank(ordered, 0.5), p90=rank(ordered, 0.9), p99=rank(ordered, 0.99))


def rank(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One workload in one run; shares are of all that were submitted and count."""

    workload: str
    kind: Kind
    submitted: int
    finished: int
    rejected: int
    failed: int
    unfinished: int
    ttft_attained: float | None
    """None where no request counts."""
    tpot_attained: float | None
    attained: float | None
    """Online: both targets. Offline: finished in its window."""
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    goodput_per_s: float
    """Online: requests that attained, per second of arrivals after the warm-up. Offline: those
    that ended in time before arrivals end, per second from the start; a backlog that is done
    earlier, per second until then."""
    tokens_per_s: float
    """Of answers, while requests arrive; those of requests from before count too."""
    wasted_tokens: int
    retries: int
    gpu_s: float
    """Of the whole fleet over the whole run, the same for each workload."""
    parts_ms: tuple[float, ...]
    """The mean time that finished requests spent in each of PARTS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """One workload's latencies at each of SHARES."""

    workload: str
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]


def figures_of(facts: RunFacts, records: Sequence[Record]) -> list[Figures]:
    """Each workload in the order of its first request."""
    return [_figures(facts, of_one) for of_one in _by_workload(records)]


def distributions_of(facts: RunFacts, records: Sequence[Record]) -> list[Distributions]:
    found = []
    for of_one in _by_workload(records):
        counted = _counted(facts, of_one)
        ttft_ms, tpot_ms = sorted(_ttft_ms(counted)), sorted(_tpot_ms(counted))
        found.append(
            Distributions(
                workload=of_one[0].workload,
                ttft_ms=tuple(v for s in SHARES if (v := rank(ttft_ms, s)) is not None),
                tpot_ms=tuple(v for s in SHARES if (v := rank(tpot_ms, s)) is not None),
            )
        )
    return found


def _by_workload(records: Iterable[Record]) -> list[list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.workload, []).append(record)
    return list(found.values())


def _figures(facts: RunFacts, records: Sequence[Record]) -> Figures:
    counted = _counted(facts, records)
    ended = {state: sum(it.ended is state for it in counted) for state in Ended}
    seconds = (facts.until_us - facts.from_us) / 1e6
    attained = sum(it.keeps_all for it in counted)
    tokens = sum(it.tokens_between(facts.from_us, facts.until_us) for it in records)
    return Figures(
        workload=records[0].workload,
        kind=records[0].kind,
        submitted=len(counted),
        finished=ended[Ended.FINISHED],
        rejected=ended[Ended.REJECTED],
        failed=ended[Ended.FAILED],
        unfinished=ended[Ended.UNFINISHED],
        ttft_attained=_share(sum(it.keeps_ttft for it in counted), len(counted)),
        tpot_attained=_share(sum(it.keeps_tpot for it in counted), len(counted)),
        attained=_share(attained, len(counted)),
        ttft_ms=Quantiles.of(_ttft_ms(counted)),
        tpot_ms=Quantiles.of(_tpot_ms(counted)),
        goodput_per_s=_offline_goodput(facts, records)
        if records[0].kind is Kind.OFFLINE
        else attained / seconds,
        tokens_per_s=tokens / seconds,
        wasted_tokens=sum(it.wasted_tokens for it in counted),
        retries=sum(max(0, it.attempts - 1) for it in counted),
        gpu_s=facts.gpu_s,
        parts_ms=_parts_ms(counted),
    )


def _offline_goodput(facts: RunFacts, records: Sequence[Record]) -> float:
    """What the fleet got done while it was loaded, not what somebody had put into the queue."""
    last_us = [it.last_us for it in records if it.last_us is not None and it.keeps_all]
    inside = [us for us in last_us if us <= facts.until_us]
    is_backlog = all(it.arrival_us == 0 for it in records)
    is_done = len(inside) == len(records)
    seconds = (max(inside) if is_backlog and is_done else facts.until_us) / 1e6
    return len(inside) / seconds


def _counted(facts: RunFacts, records: Iterable[Record]) -> list[Record]:
    """Online requests of the warm-up do not count; offline work has no latency to warm up."""
    return [it for it in records if it.kind is Kind.OFFLINE or it.arrival_us >= facts.from_us]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _ttft_ms(records: Iterable[Record]) -> list[float]:
    return [us / 1e3 for it in records if (us := it.ttft_us) is not None]


def _tpot_ms(records: Iterable[Record]) -> list[float]:
    """Of answers that came to their end."""
    return [us / 1e3 for it in records if it.has_finished and (us := it.tpot_us) is not None]


def _parts_ms(records: Iterable[Record]) -> tuple[float, ...]:
    spent = [it.parts_us() for it in records if it.has_finished]
    return tuple(sum(part) / len(spent) / 1e3 for part in zip(*spent, strict=True))
