"""What a decode step takes as a line in its requests and their tokens, learnt from steps seen."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

from policies.least_squares import Products

COLUMNS = (0, 1, 2)
OUTLIER = 3.0
"""Steps that took so many times the median of those like them say nothing of the line."""


ROUNDS = 4
LOW, HIGH = 0.7, 1.3
"""Steps that took so many times what the line says are left out, and the line is fitted anew."""


class StepLine(NamedTuple):
    """Of terms that are never negative, so that more work never seems to take less time."""

    base_us: float
    request_us: float = 0.0
    token_us: float = 0.0

    def step_us(self, count: int, context_tokens: int, longest_tokens: int = 0) -> float:
        return self.base_us + self.request_us * count + self.token_us * context_tokens


class SeenStep(NamedTuple):
    requests: int
    context_tokens: int
    took_us: float


def fitted(steps: list[SeenStep]) -> StepLine | None:
    """The best line whose terms are all positive or absent; None where there is nothing to see.

    What holds a step up makes it longer, never shorter: with such steps in it, the line would lie
    above the usual ones, most of all where steps are short.
    """
    steps = _usual(steps)
    line = _least(steps)
    for _ in range(ROUNDS):
        if line is None:
            return None
        near = [step for step in steps if LOW <= step.took_us / line.step_us(*step[:2]) <= HIGH]
        line = _least(near) or line
    return line


def _least(steps: list[SeenStep]) -> StepLine | None:
    if not steps:
        return None
    products = Products(
        [
            [1.0] * len(steps),
            [float(step.requests) for step in steps],
            [float(step.context_tokens) for step in steps],
            [step.took_us for step in steps],
        ]
    )
    best: tuple[float, StepLine] | None = None
    for size in COLUMNS:
        for chosen in combinations(COLUMNS, size + 1):
            found = products.fitted(chosen)
            if found is None or min(found[0]) < 0:
                continue
            terms = dict(zip(chosen, found[0], strict=True))
            line = StepLine(*(terms.get(column, 0.0) for column in COLUMNS))
            if best is None or found[1] < best[0] * (1 - 1e-6):
                best = found[1], line
    return None if best is None else best[1]


def _usual(steps: list[SeenStep]) -> list[SeenStep]:
    times = sorted(step.took_us for step in steps if step.took_us > 0)
    if not times:
        return []
    most_us = OUTLIER * times[len(times) // 2]
    return [step for step in steps if 0 < step.took_us <= most_us]
