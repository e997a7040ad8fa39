"""How long no server is emptied after a change that came to nothing: longer each time in a row."""

from __future__ import annotations

import structlog

from policies.clock import Clock
from policies.events import Outcome, SwitchOver

log = structlog.get_logger("slackwater.ratio")

FIRST_S, LONGEST_S = 15.0, 600.0
IN_VAIN = frozenset({Outcome.FAILED, Outcome.BUSY, Outcome.LOST})
"""The server was out of rotation, and is what it was, or worse."""


class Refusals:
    """Told of once when the first change has failed, and once when one is done again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waited_s = 0.0
        """After the last one in a row; 0: none has failed since one was done."""
        self._until_s = 0.0
        self._refused_s: dict[str, float] = {}
        """When it came to nothing with each server."""

    @property
    def waits(self) -> bool:
        return self._clock.time() < self._until_s

    def was_refused(self, worker: str) -> bool:
        """Of late: others are asked before it."""
        refused_s = self._refused_s.get(worker)
        return refused_s is not None and self._clock.time() - refused_s < LONGEST_S

    def over(self, over: SwitchOver) -> None:
        if over.outcome is Outcome.DONE:
            self._done(over.worker)
        elif over.outcome in IN_VAIN:
            self._refused(over)

    def _done(self, worker: str) -> None:
        self._refused_s.pop(worker, None)
        if self._waited_s:
            log.info("changes are done again")
        self._waited_s = self._until_s = 0.0

    def _refused(self, over: SwitchOver) -> None:
        now_s = self._clock.time()
        wait_s = min(LONGEST_S, 2 * self._waited_s or FIRST_S)
        if not self._waited_s:
            log.warning(
                "a change came to nothing", worker=over.worker, error=over.why, again_s=wait_s
            )
        self._waited_s = wait_s
        self._until_s = max(self._until_s, now_s + wait_s)
        self._refused_s = {
            name: at_s for name, at_s in self._refused_s.items() if now_s - at_s < LONGEST_S
        }
        self._refused_s[over.worker] = now_s
