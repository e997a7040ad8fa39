"""How many rows are taken from the store: as many as can run soon, none while nobody can answer."""

from __future__ import annotations

from dataclasses import dataclass

_GROWTH = 2
_FIRST_PAUSE_US = 250_000
_LONGEST_PAUSE_US = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceRule:
    least_ahead: int = 16
    """Rows that wait in the queue although nothing runs out: what a turn may need."""
    most_held: int = 4096
    """Rows in memory, those that run included."""


class Pace:
    """Keeps the queue twice as long as what left it since the last look."""

    __slots__ = ("_pause_us", "_rule", "_taken", "_waiting", "quiet_until_us")

    def __init__(self, rule: PaceRule) -> None:
        self._rule = rule
        self._waiting = self._taken = 0
        self._pause_us = 0
        self.quiet_until_us = 0
        """Nobody could answer: until then it is not tried again."""

    def room(self, *, held: int, waiting: int, now_us: int) -> int:
        """How many rows to take now; to be asked once a turn. `waiting`: of those held."""
        if now_us < self.quiet_until_us:
            return 0
        left = max(0, self._waiting + self._taken - waiting)
        most = self._rule.least_ahead if self._pause_us else _GROWTH * left
        ahead = max(self._rule.least_ahead, most)
        self._waiting, self._taken = waiting, 0
        return max(0, min(ahead - waiting, self._rule.most_held - held))

    def took(self, rows: int) -> None:
        self._taken = rows

    def refused(self, now_us: int) -> None:
        """Nobody could answer a row. All rows of one bad moment count once."""
        if now_us < self.quiet_until_us:
            return
        self._pause_us = min(max(_FIRST_PAUSE_US, _GROWTH * self._pause_us), _LONGEST_PAUSE_US)
        self.quiet_until_us = now_us + self._pause_us

    def answered(self) -> None:
        self._pause_us = self.quiet_until_us = 0
