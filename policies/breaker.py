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

    __slots__ = ("_cooldown_us", "_row", "_trial", "open_until_us", "rule")

    def __init__(self, rule: BreakerRule) -> None:
        self.rule = rule
        self._row = 0
        self._cooldown_us = rule.cooldown_us
        self._trial = False
        self.open_until_us = 0

    def __repr__(self) -> str:
        state = "closed" if not self.open_until_us else "half-open" if self._trial else "open"
        return f"<Breaker {state}, {self._row} in a row>"

    @property
    def is_closed(self) -> bool:
        return not self.open_until_us

    def allows(self, now_us: int) -> bool:
        return not self.open_until_us or (now_us >= self.open_until_us and not self._trial)

    def try_out(self) -> bool:
        """A job goes to this server; whether it is the trial, which no other job joins."""
        self._trial = self.open_until_us > 0
        return self._trial

    def succeeded(self) -> None:
        self._row, self._trial, self.open_until_us = 0, False, 0
        self._cooldown_us = self.rule.cooldown_us

    def gave_no_verdict(self) -> None:
        """The trial ended for a reason that says nothing about the server."""
        self._trial = False

    def failed(self, now_us: int) -> None:
        self._row += 1
        if self.open_until_us:
            if self._trial or now_us >= self.open_until_us:
                self._cooldown_us = min(2 * self._cooldown_us, self.rule.cooldown_max_us)
                self.open_until_us = now_us + self._cooldown_us
            self._trial = False
        elif self._row >= self.rule.failures:
            self.open_until_us = now_us + self._cooldown_us
