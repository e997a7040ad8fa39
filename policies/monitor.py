"""What came in of late and how long it was: sums in a ring of buckets, a few additions an event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from policies.demand import Flow, Lengths
from policies.types import Kind

SMOOTHEST, BURSTIEST = 0.25, 50.0
"""Bounds of a burstiness that is estimated from few gaps."""
FEWEST_GAPS = 8


@dataclass(slots=True)
class Sum:
    """Of values, with what their variance takes."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value

    def include(self, other: Sum) -> None:
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def lengths(self) -> Lengths:
        if not self.count:
            return Lengths()
        mean = self.total / self.count
        return Lengths(mean, max(0.0, self.squares / self.count - mean * mean))


class Seen(StrEnum):
    """What is counted."""

    PROMPT = "prompt_tokens"
    CACHED = "cached_tokens"
    GAP = "gap_us"
    ANSWER = "answer_tokens"
    TTFT = "ttft_us"
    TPOT = "tpot_us"
    STAY = "stay_us"


class _Bucket:
    __slots__ = ("number", "sums")

    def __init__(self) -> None:
        self.number = -1
        self.sums: dict[Kind, dict[Seen, Sum]] = {}

    def begin(self, number: int) -> None:
        self.number = number
        self.sums = {kind: {seen: Sum() for seen in Seen} for kind in Kind}


class Monitor:
    """Told of every job at the ingress and at its end; the memory is that of its buckets."""

    __slots__ = ("_began_us", "_bucket_us", "_buckets", "_last_us")

    def __init__(self, now_us: int, *, window_s: float = 300.0, bucket_s: float = 1.0) -> None:
        self._began_us = now_us
        self._bucket_us = max(1, round(bucket_s * 1e6))
        self._buckets = [_Bucket() for _ in range(max(2, round(window_s / bucket_s)))]
        self._last_us: dict[Kind, int] = {}

    @property
    def window_us(self) -> int:
        return len(self._buckets) * self._bucket_us

    def arrived(self, kind: Kind, prompt_tokens: int, cached_tokens: int, now_us: int) -> None:
        sums = self._at(now_us)[kind]
        sums[Seen.PROMPT].add(prompt_tokens)
        sums[Seen.CACHED].add(min(cached_tokens, prompt_tokens))
        if (last_us := self._last_us.get(kind)) is not None:
            sums[Seen.GAP].add(max(0, now_us - last_us))
        self._last_us[kind] = now_us

    def seen(self, kind: Kind, what: Seen, value: float, now_us: int) -> None:
        self._at(now_us)[kind][what].add(value)

    def sum(self, kind: Kind, what: Seen, span_us: int, now_us: int) -> Sum:
        """Over the last `span_us`, in whole buckets."""
        found = Sum()
        for bucket in self._recent(span_us, now_us):
            found.include(bucket.sums[kind][what])
        return found

    def idle_us(self, now_us: int) -> int:
        return now_us - max(self._last_us.values(), default=self._began_us)

    def rate_per_s(self, kind: Kind, span_us: int, now_us: int) -> float:
        arrivals = self.sum(kind, Seen.PROMPT, span_us, now_us)
        return arrivals.count * 1e6 / self._covered_us(span_us, now_us)

    def flow(self, kind: Kind, now_us: int, *, rate_us: int, lengths_us: int) -> Flow:
        """Rate and burstiness over one span, lengths over another."""
        prompts = self.sum(kind, Seen.PROMPT, lengths_us, now_us)
        cached = self.sum(kind, Seen.CACHED, lengths_us, now_us)
        gaps = self.sum(kind, Seen.GAP, lengths_us, now_us)
        return Flow(
            rate_per_s=self.rate_per_s(kind, rate_us, now_us),
            burstiness=_burstiness(gaps),
            prompt=prompts.lengths,
            answer=self.sum(kind, Seen.ANSWER, lengths_us, now_us).lengths,
            cached_share=cached.total / prompts.total if prompts.total else 0.0,
        )

    def _at(self, now_us: int) -> dict[Kind, dict[Seen, Sum]]:
        number = now_us // self._bucket_us
        bucket = self._buckets[number % len(self._buckets)]
        if bucket.number != number:
            bucket.begin(number)
        return bucket.sums

    def _recent(self, span_us: int, now_us: int) -> Iterator[_Bucket]:
        first, last = self._bounds(span_us, now_us)
        for number in range(first, last + 1):
            bucket = self._buckets[number % len(self._buckets)]
            if bucket.number == number:
                yield bucket

    def _bounds(self, span_us: int, now_us: int) -> tuple[int, int]:
        last = now_us // self._bucket_us
        count = min(len(self._buckets), max(1, round(span_us / self._bucket_us)))
        return max(0, last - count + 1), last

    def _covered_us(self, span_us: int, now_us: int) -> int:
        """How long the counted buckets have lasted, the present one as far as it goes."""
        first, _ = self._bounds(span_us, now_us)
        return max(self._bucket_us, now_us - max(self._began_us, first * self._bucket_us))


def _burstiness(gaps: Sum) -> float:
    if gaps.count < FEWEST_GAPS or not gaps.total:
        return 1.0
    found = gaps.lengths
    return min(BURSTIEST, max(SMOOTHEST, found.variance / (found.mean * found.mean)))
