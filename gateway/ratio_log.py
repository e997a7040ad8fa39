"""When a look that wants another split is told of, and what the line says."""

from __future__ import annotations

from enum import StrEnum

import structlog

from gateway.planning import Look

log = structlog.get_logger("slackwater.ratio")


class Undone(StrEnum):
    """Why nothing is done of what is wanted."""

    ADVISES = "advises"
    HELD = "held"
    AWAY = "away"
    REFUSED = "refused"
    NOBODY_FREE = "nobody_free"


SAID_EACH = frozenset({Undone.ADVISES, Undone.NOBODY_FREE})
"""What is wanted is said whenever it is something else; of the others, when they begin."""


class RatioLog:
    """What is done is said each time, what is not is said once."""

    def __init__(self) -> None:
        self._said: tuple[Undone, int, int] | None = None

    def done(self, look: Look) -> None:
        self._said = None
        _say(look, acts=True)

    def undone(self, look: Look, why: Undone) -> None:
        plan = look.plan
        wish = (plan.prefills, plan.decodes) if why in SAID_EACH else (0, 0)
        if (why, *wish) != self._said:
            self._said = (why, *wish)
            _say(look, acts=False)


def _say(look: Look, *, acts: bool) -> None:
    fleet, plan = look.fleet, look.plan
    log.info(
        "ratio",
        acts=acts,
        held=look.is_held,
        have=f"{fleet.prefills}P{fleet.decodes}D",
        wanted=f"{plan.prefills}P{plan.decodes}D",
        why=plan.why.value,
        upper_per_s=round(look.forecast.upper, 3),
        by=look.forecast.by,
        terms={name: round(value, 4) for name, value in plan.terms.items()},
    )
