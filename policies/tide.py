"""How much online work a server has had lately, and so how much more of it may come any moment."""

from __future__ import annotations

from collections import deque
from math import ceil

_SECOND_US = 1_000_000
_WEIGHT = 0.05
_PACE_KEPT = 0.95
_PACE_TOKENS = 8
"""Below this nothing is said of the pace."""


class Tide:
    """Online jobs resident at one server: how many now, and the peak of each second of a minute.

    Lent room has to be there again when the flood comes: what is expected beyond the present level
    is the q90 of those peaks. A level that was passed in fewer seconds than one in ten costs a
    preemption when it comes, which is cheaper than room that stands empty.
    """

    __slots__ = (
        *("_level", "_paced_tokens", "_paced_us", "_peaks", "_second", "_tpots"),
        *("count", "tokens_each"),
    )

    SECONDS = 60
    QUANTILE = 0.9

    def __init__(self) -> None:
        self.count = 0
        self.tokens_each = 0.0
        """KV tokens that one of them takes."""
        self._paced_us = self._paced_tokens = 0.0
        self._tpots: dict[int, int] = {}
        self._peaks: deque[int] = deque(maxlen=self.SECONDS)
        self._second = 0
        self._level = 0

    @property
    def expected(self) -> int:
        """Online jobs that may come on top of those present."""
        return max(0, self._level - self.count)

    def came(self, tokens: int, tpot_us: int, now_us: int) -> None:
        self.roll(now_us)
        self.count += 1
        self._tpots[tpot_us] = self._tpots.get(tpot_us, 0) + 1
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], self.count)
        known = self.tokens_each or tokens
        self.tokens_each = known + _WEIGHT * (tokens - known)

    def went(self, tpot_us: int) -> None:
        self.count -= 1
        if self._tpots[tpot_us] > 1:
            self._tpots[tpot_us] -= 1
        else:
            del self._tpots[tpot_us]
        if not self.count:
            self.forget_pace()

    def roll(self, now_us: int) -> None:
        """A new second begins at the present level; nothing is known of those that were missed."""
        second = now_us // _SECOND_US
        if second == self._second and self._peaks:
            return
        missed = min(second - self._second, self.SECONDS) if self._peaks else 1
        self._peaks.extend([self.count] * missed)
        self._second = second
        ranked = sorted(self._peaks)
        self._level = ranked[ceil(self.QUANTILE * len(ranked)) - 1]

    def paced(self, us: int, tokens: int) -> None:
        """A job got so many tokens in that time."""
        self._paced_us = self._paced_us * _PACE_KEPT + us
        self._paced_tokens = self._paced_tokens * _PACE_KEPT + tokens

    def forget_pace(self) -> None:
        self._paced_us = self._paced_tokens = 0.0

    @property
    def pace_us(self) -> float:
        """What a token has really taken lately; 0 while little is known."""
        if self._paced_tokens < _PACE_TOKENS:
            return 0.0
        return self._paced_us / self._paced_tokens

    def tightest_us(self, target_us: int) -> int:
        """The time a token may take here: the tightest target of those present, else this one."""
        wanted = [us for us in self._tpots if us]
        return min(wanted) if wanted else target_us
