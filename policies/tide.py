"""How fast online work has come to a server lately, and so how much of it may come any moment."""

from __future__ import annotations

from collections import deque
from math import ceil

_SECOND_US = 1_000_000
_WEIGHT = 0.05
_PACE_KEPT = 0.9
"""Of the evidence, from one look to the next."""
_PACE_US = 250_000
"""Before it has been watched for so long nothing is said of the pace: one prompt that is computed
between two steps holds all streams of a server up at once."""


class Tide:
    """Online jobs resident at one server: how many now, and by how many they rose in each second
    of the last minute.

    Lent room is taken back within about a second, so that much has to stand empty and no more: the
    q90 of those rises. What comes faster in fewer seconds than one in ten costs preemptions, which
    are cheaper than room that stands empty from one flood to the next.
    """

    __slots__ = (
        *("_began", "_paced_tokens", "_paced_us", "_peak", "_rises", "_second", "_tpots"),
        *("_last_pace_us", "_looked_us", "_watched_us", "count", "expected", "tokens_each"),
    )

    SECONDS = 60
    QUANTILE = 0.9

    def __init__(self) -> None:
        self.count = 0
        self.tokens_each = 0.0
        """KV tokens that one of them takes."""
        self._paced_us = self._paced_tokens = self._watched_us = self._last_pace_us = 0.0
        self._looked_us = 0
        self._tpots: dict[int, int] = {}
        self._rises: deque[int] = deque(maxlen=self.SECONDS)
        self._second = self._began = self._peak = 0
        self.expected = 0
        """Online jobs that may come on top of those present before room is made for them."""

    def came(self, tokens: int, tpot_us: int, now_us: int) -> None:
        self.roll(now_us)
        self.count += 1
        self._tpots[tpot_us] = self._tpots.get(tpot_us, 0) + 1
        if self.count > self._peak:
            self._peak = self.count
        known = self.tokens_each or tokens
        self.tokens_each = known + _WEIGHT * (tokens - known)

    def went(self, tpot_us: int) -> None:
        self.count -= 1
        if self._tpots[tpot_us] > 1:
            self._tpots[tpot_us] -= 1
        else:
            del self._tpots[tpot_us]
        if not self.count:
            self._paced_us = self._paced_tokens = self._watched_us = self._last_pace_us = 0.0

    def roll(self, now_us: int) -> None:
        """A second ends at its peak, and the next begins at the present level."""
        second = now_us // _SECOND_US
        passed = second - self._second
        if passed <= 0:
            return
        self._rises.append(self._peak - self._began)
        self._rises.extend([0] * min(passed - 1, self.SECONDS))
        self._second = second
        self._began = self._peak = self.count
        ranked = sorted(self._rises)
        self.expected = ranked[ceil(self.QUANTILE * len(ranked)) - 1]

    def paced(self, us: int, tokens: int, now_us: int) -> bool:
        """A job got so many tokens in that time. What is told of several at once is one look;
        whether this is a new one."""
        is_new = now_us != self._looked_us or not self._watched_us
        if is_new:
            self._looked_us = now_us
            self._watched_us = self._watched_us * _PACE_KEPT + us
            self._paced_us *= _PACE_KEPT
            self._paced_tokens *= _PACE_KEPT
        self._paced_us += us
        self._paced_tokens += tokens
        return is_new

    def forget_pace(self) -> None:
        """It will be another one, because of what has just been taken off."""
        self._last_pace_us = self.last_pace_us
        self._paced_us = self._paced_tokens = self._watched_us = 0.0

    @property
    def pace_us(self) -> float:
        """What a token has really taken lately; 0 while little is known."""
        if self._watched_us < _PACE_US:
            return 0.0
        return self._paced_us / self._paced_tokens

    @property
    def last_pace_us(self) -> float:
        """The same, or what it was before: until better is seen, nothing says that it is better."""
        return self.pace_us or self._last_pace_us

    def tightest_us(self, target_us: int) -> int:
        """The time a token may take here: the tightest target of those present, else this one."""
        wanted = [us for us in self._tpots if us]
        return min(wanted) if wanted else target_us
