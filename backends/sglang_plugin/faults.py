"""When a feature shuts itself off: after three faults, said each time, the server serves on."""

from __future__ import annotations

import logging
from typing import Final

log = logging.getLogger("sglang.slackwater")

MOST: Final = 3


class Faults:
    """Of one feature."""

    __slots__ = ("_said", "feature", "number", "why_off")

    def __init__(self, feature: str) -> None:
        self.feature = feature
        self.number = 0
        self.why_off = ""
        """Empty while it is on."""
        self._said: set[str] = set()

    @property
    def over(self) -> bool:
        return bool(self.why_off)

    def count(self, error: Exception) -> None:
        self.number += 1
        told = f"{type(error).__name__}: {error}"
        log.error("slackwater: %s: fault %d of %d: %s", self.feature, self.number, MOST, told)
        if self.number >= MOST and not self.why_off:
            self.turn_off(f"{MOST} faults, the last one {told}")

    def turn_off(self, why: str) -> None:
        self.why_off = why
        log.warning("slackwater: %s is off: %s", self.feature, why)

    def turn_on(self) -> None:
        """By a person's word; what was off before any fault stays off."""
        if self.number >= MOST:
            self.number, self.why_off = 0, ""

    def say(self, told: str) -> None:
        """Once."""
        if told not in self._said:
            self._said.add(told)
            log.warning("slackwater: %s: %s", self.feature, told)
