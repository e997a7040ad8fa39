"""Decode steps that nothing will disturb, known in advance: long simulations cost less so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MOST_STEPS: Final = 64
"""Whatever comes in between ends a leap after the step in course, and the rest was for nothing."""
HALF_US = 5e-7


class Leap:
    """When each step ends and what it takes; those counted already come first."""

    __slots__ = ("counted", "ends_s", "took_us")

    def __init__(self, start_s: float, steps_s: Iterable[float]) -> None:
        self.counted = 0
        self.ends_s: list[float] = []
        self.took_us: list[float] = []
        for took_s in steps_s:
            start_s += took_s
            self.ends_s.append(start_s)
            self.took_us.append(took_s * 1e6)

    def pass_until(self, now_s: float) -> list[float]:
        """Count the steps that ended by now, but never the last one; answers what they took."""
        ends_s, first = self.ends_s, self.counted
        last = len(ends_s) - 1
        until = first
        while until < last and ends_s[until] <= now_s + HALF_US:
            until += 1
        self.counted = until
        return self.took_us[first:until]

    def cut(self) -> bool:
        """End with the step in course; whether it would have ended later."""
        length = self.counted + 1
        if length == len(self.ends_s):
            return False
        del self.ends_s[length:], self.took_us[length:]
        return True
