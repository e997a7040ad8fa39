"""Whether the load needs more servers than there may be, and since when it does not any more."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from gateway.planning import Look

log = structlog.get_logger("slackwater.ratio")

CALM_S = 60.0
"""It is over when the servers have been enough for so long."""


@dataclass(slots=True)
class Shortage:
    """Told of when it begins and when it is over."""

    is_told: bool = False
    _short_us: int = 0
    """When they were too few last."""

    def look(self, look: Look) -> None:
        if is_too_small(look):
            self._short_us = look.now_us
            if not self.is_told:
                self.is_told = True
                prefills, decodes = look.need or (0, 0)
                log.warning(
                    "the fleet is too small for its load",
                    need=f"{prefills}P{decodes}D",
                    gpus=look.fleet.limit_gpus,
                    upper_per_s=round(look.forecast.upper, 3),
                )
        elif self.is_told and look.now_us - self._short_us >= CALM_S * 1e6:
            self.is_told = False
            log.info("the fleet is large enough again")


def is_too_small(look: Look) -> bool:
    """Of policies that do not say what they need, nobody knows."""
    if look.need is None:
        return False
    return look.fleet.gpus_of(*look.need) > look.fleet.limit_gpus
