"""Whether whoever changes servers would do it: asked before one is taken out of rotation for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from backends.actuators.turning import Hindrance
from policies.clock import Clock

log = structlog.get_logger("slackwater.ratio")

AGAIN_S = 5.0
"""Who could change nothing is asked again after this time, if there is anything to do."""


class Reach:
    """Told of once when it is lost, and once when it is back."""

    def __init__(self, hindrance: Callable[[], Awaitable[Hindrance | None]], clock: Clock) -> None:
        self._ask = hindrance
        self._clock = clock
        self._asked_s = 0.0
        self._found: Hindrance | None = None
        """When it was asked last."""

    @property
    def answers(self) -> bool:
        """Did so, if only to say that it listens to somebody else."""
        return self._found is None or self._found.by_another

    async def lost(self) -> bool:
        if self._found is not None and self._clock.time() - self._asked_s < AGAIN_S:
            return True
        was, self._found = self._found, await self._ask()
        self._asked_s = self._clock.time()
        self._tell(was, self._found)
        return self._found is not None

    @staticmethod
    def _tell(was: Hindrance | None, found: Hindrance | None) -> None:
        if found is None:
            if was is not None:
                log.info("servers can be changed again")
        elif was is None or was.by_another is not found.by_another:
            if found.by_another:
                log.info("somebody else changes the servers", error=found.why)
            else:
                log.warning("no server can be changed for now", error=found.why)
