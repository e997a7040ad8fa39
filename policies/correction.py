"""How a worker differs from its prediction right now: a median of the last measured ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

WINDOW = 15
"""Up to seven strange steps change nothing, a change of speed is in force after eight."""

MOST_AT_ONCE = 7
"""A report that holds more steps counts no more: one strange report changes nothing."""

FASTEST, SLOWEST = 1 / 16, 16.0
"""A worker outside of these is broken, not slow; its factor stops here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One worker and one phase; multiply a predicted time by `factor`."""

    factor: float = 1.0
    ratios: tuple[float, ...] = ()
    """Logarithms of measured over predicted, oldest first."""
    steps: int = 0
    refused: int = 0
    """Measurements that were no positive time."""
    updated_us: int = 0

    @property
    def size(self) -> float:
        """0 when predictions are right as they are, 1 when the worker takes twice as long."""
        return self.factor - 1

    @property
    def error(self) -> float:
        """The median relative error that is left after the correction."""
        if not self.ratios:
            return 0.0
        centre = math.log(self.factor)
        return median(abs(math.expm1(ratio - centre)) for ratio in self.ratios)

    @property
    def is_in_force(self) -> bool:
        """Whether the steps that are known outweigh those that are missing."""
        return 2 * len(self.ratios) > WINDOW

    def age_us(self, now_us: int) -> int:
        """Since the last step that counted; as old as time itself before the first."""
        return now_us - self.updated_us


def observe(
    correction: Correction, *, predicted_s: float, measured_s: float, now_us: int, steps: int = 1
) -> Correction:
    """The correction after one more step, or after the mean of several.

    `predicted_s` is the uncorrected prediction.
    """
    if not _is_time(predicted_s) or not _is_time(measured_s):
        return Correction(
            factor=correction.factor,
            ratios=correction.ratios,
            steps=correction.steps,
            refused=correction.refused + 1,
            updated_us=correction.updated_us,
        )
    weight = min(max(1, steps), MOST_AT_ONCE)
    news = (math.log(measured_s / predicted_s),) * weight
    ratios = (*correction.ratios[-(WINDOW - weight) :], *news)
    return Correction(
        factor=min(SLOWEST, max(FASTEST, math.exp(_shrunk(ratios)))),
        ratios=ratios,
        steps=correction.steps + max(1, steps),
        refused=correction.refused,
        updated_us=now_us,
    )


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _shrunk(ratios: tuple[float, ...]) -> float:
    """While few steps are known the missing ones count as correctly predicted."""
    return median((*ratios, *(0.0,) * (WINDOW - len(ratios))))
