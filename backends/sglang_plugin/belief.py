"""How long this engine takes a step to last: by a gateway's line or its own, and by what it saw."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from policies.step_line import SeenStep, StepLine, fitted
from policies.step_table import StepTable

FEWEST_STEPS: Final = 32
"""Before so many were seen, nothing is claimed without a gateway's word."""
REMEMBERED: Final = 512
"""A fit over so many holds the engine up for some milliseconds, once."""


class Belief:
    """Without a line from outside it fits its own, anew whenever twice as many steps are known."""

    __slots__ = ("_fit_at", "_given", "_seen", "_steps", "line", "table")

    def __init__(self) -> None:
        self._steps: deque[SeenStep] = deque(maxlen=REMEMBERED)
        self._given: StepLine | None = None
        self._seen, self._fit_at = 0, FEWEST_STEPS
        self.line: StepLine | None = None
        self.table: StepTable | None = None

    @property
    def line_from(self) -> str:
        """Whose word on steps it goes by; empty: it has none, and everybody steps."""
        if self.line is None:
            return ""
        return "steps" if self._given is None else "gateway"

    def adopt(self, line: StepLine | None) -> None:
        if line == self._given:
            return
        self._given = line
        self._begin(line)
        self._fit_at = max(FEWEST_STEPS, self._seen)

    def saw(self, steps: Sequence[SeenStep], *, corrects: bool) -> None:
        self._steps += steps
        self._seen += len(steps)
        if corrects and self.table is not None:
            for count, tokens, took_us in steps:
                self.table.observe(count, tokens, tokens, took_us)

    def is_ready(self) -> bool:
        """Whether anything can be said of a step; fits what has been seen where that is due."""
        if self._given is None and self._seen >= self._fit_at:
            self._fit_at = 2 * self._seen
            self._begin(fitted([*self._steps]))
        return self.table is not None

    def step_us(self, count: int, context_tokens: int, longest_tokens: int) -> float:
        assert self.table is not None
        return self.table.step_us(count, context_tokens, longest_tokens)

    def _begin(self, line: StepLine | None) -> None:
        self.line = line
        self.table = None if line is None else StepTable(line.step_us, by_longest=False)
