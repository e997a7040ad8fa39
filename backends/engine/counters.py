"""Cumulative figures of one server, as /v1/loads and /metrics show them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

TTFT_BOUNDS_S = (
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0),
    *(20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0),
)
E2E_BOUNDS_S = (*TTFT_BOUNDS_S, 600.0, 1200.0, 1800.0, 2400.0)
ITL_BOUNDS_S = (
    *(0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040),
    *(0.060, 0.080, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0),
)


class Histogram:
    """Observations by bucket, each counted in the first bound that holds it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(slots=True)
class Counters:
    prefill_uncached_tokens: int = 0
    prefill_cached_tokens: int = 0
    prefill_busy_us: int = 0
    decode_moments: list[float] = field(default_factory=lambda: [0.0] * 6)
    """n, sum b, sum t_us, sum b^2, sum b*t_us, tokens generated; of steps that follow another."""
    retractions: int = 0
    requests: int = 0
    aborts: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    bootstrap_failures: int = 0
    transfer_failures: int = 0
    transferred_bytes: int = 0
    tokens_per_s: float = 0.0
    """Of the last decode step."""
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    itl: Histogram = field(default_factory=lambda: Histogram(ITL_BOUNDS_S))
    e2e: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS_S))

    def decoded(self, batch: int, step_us: float, *, since_launch_us: float) -> None:
        """SGLang measures from launch to launch: the first step of a run has no time of its own,
        each later one that of the step before it."""
        if since_launch_us > 0:
            moments = self.decode_moments
            moments[0] += 1
            moments[1] += batch
            moments[2] += since_launch_us
            moments[3] += batch * batch
            moments[4] += batch * since_launch_us
            moments[5] += batch
        self.generated_tokens += batch
        self.tokens_per_s = batch / step_us * 1e6 if step_us else 0.0
        self.itl.observe(step_us / 1e6, batch)

    def decoded_alike(self, batch: int, steps_us: Sequence[float]) -> None:
        """Several steps of one batch."""
        count, total_us = len(steps_us), sum(steps_us)
        if not count:
            return
        sums = (count, count * batch, total_us, count * batch**2, batch * total_us, count * batch)
        for index, amount in enumerate(sums):
            self.decode_moments[index] += amount
        self.generated_tokens += count * batch
        self.tokens_per_s = batch / steps_us[-1] * 1e6 if steps_us[-1] else 0.0
        for step_us in steps_us:
            self.itl.observe(step_us / 1e6, batch)
