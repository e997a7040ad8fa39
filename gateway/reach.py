"""Whether whoever changes servers answers: asked before one is taken out of rotation for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from policies.clock import Clock

log = structlog.get_logger("slackwater.ratio")

AGAIN_S = 5.0
"""Who did not answer is asked again after this time, if there is anything to do."""


class Reach:
    """Told of once when it is lost, and once when it is back."""

    def __init__(self, ready: Callable[[], Awaitable[str]], clock: Clock) -> None:
        self._ready = ready
        self._clock = clock
        self._asked_s = 0.0
        self.why = ""
        """Why nothing could be changed when it was asked last."""

    async def lost(self) -> bool:
        if self.why and self._clock.time() - self._asked_s < AGAIN_S:
            return True
        was, self.why = self.why, await self._ready()
        self._asked_s = self._clock.time()
        if self.why and not was:
            log.warning("no server can be changed for now", error=self.why)
        elif was and not self.why:
            log.info("servers can be changed again")
        return bool(self.why)
