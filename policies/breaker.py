"""When a server that fails is left alone, and when it is tried again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRule:
    failures: int = 3
    """This many in a row open the breaker."""
    cooldown_us: int = 2_000_000
    """The first pause; it doubles with each failed trial."""
    cooldown_max_us: int = 30_000_000


class Breaker:
    """Closed, open until a time, or half-open with one trial under way; one success closes it."""

    __slots__ = ("_cooldown_us", "_row", "_trial", "_trials", "open_until_us", "rule")

    def __init__(self, rule: BreakerRule) -> None:
        self.rule = rule
        self._row = 0
        self._cooldown_us = rule.cooldown_us
        self._trial = 0
        """The number of the trial under way; 0: none is."""
        self._trials = 0
        self.open_until_us = 0

    def __repr__(self) -> str:
        return f"<Breaker {self.state}, {self._row} in a row>"

    @property
    def state(self) -> str:
        """closed, open, or half-open: one job tries the server out."""
        return "closed" if not self.open_until_us else "half-open" if self._trial else "open"

    @property
    def failures_in_a_row(self) -> int:
        return self._row

    @property
    def is_closed(self) -> bool:
        return not self.open_until_us

    def allows(self, now_us: int) -> bool:
        return not self.open_until_us or (now_us >= self.open_until_us and not self._trial)

    def try_out(self) -> int:
        """A job goes to this server; the number of the trial that it is, which no other job joins.

        0: the server needs none.
        """
        if self.open_until_us:
            self._trials += 1
            self._trial = self._trials
        return self._trial

    def succeeded(self) -> None:
        self._row, self._trial, self.open_until_us = 0, 0, 0
        self._cooldown_us = self.rule.cooldown_us

    def gave_no_verdict(self, trial: int) -> None:
        """It ended for a reason that says nothing about the server; later ones are not its own."""
        if self._trial == trial:
            self._trial = 0

    def failed(self, now_us: int) -> None:
        self._row += 1
        if self.open_until_us:
            if self._trial or now_us >= self.open_until_us:
                self._cooldown_us = min(2 * self._cooldown_us, self.rule.cooldown_max_us)
                self.open_until_us = now_us + self._cooldown_us
            self._trial = 0
        elif self._row >= self.rule.failures:
            self.open_until_us = now_us + self._cooldown_us
