"""Says when offline work has no server of its own, and when strict ones can lend it nothing."""

from __future__ import annotations

from enum import Enum

import structlog

from gateway.config import Config
from gateway.core import Core
from policies.clock import Clock, Timer
from policies.ledger import Ledger
from policies.types import Pool, Role

log = structlog.get_logger("slackwater")

LOOK_S = 0.5


class _State(Enum):
    UNKNOWN = 0
    NONE = 1
    """No server is relaxed."""
    AWAY = 2
    """Some are, and none of them is in rotation."""
    THERE = 3


class RelaxedWatch:
    """Looks at the decode servers twice a second; says what has changed, once."""

    def __init__(self, core: Core, clock: Clock, config: Config) -> None:
        self._core = core
        self._clock = clock
        self._timer: Timer | None = None
        self._state = _State.UNKNOWN
        self._lends = True
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """What was said of other rules is said anew."""
        self._is_pooled = config.policies.pools == "latency"
        self._without = config.colocation.without_relaxed.value
        lends_us = config.colocation.lend_share * config.classes.online.tpot_ms * 1e3
        self._lends_below_us = lends_us
        self._state, self._lends = _State.UNKNOWN, True

    def start(self) -> None:
        self.look()
        self._timer = self._clock.call_at(self._clock.time() + LOOK_S, self.start)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def look(self) -> None:
        decodes = [e for e in self._core.ledgers.values() if e.worker.role is not Role.PREFILL]
        if not self._is_pooled or not decodes:
            return
        before, self._state = self._state, self._seen(decodes)
        if self._state is not before:
            self._say(before)
        if self._state is not _State.THERE:
            self._say_what_strict_ones_lend(decodes)

    def _seen(self, decodes: list[Ledger]) -> _State:
        relaxed = [e for e in decodes if e.worker.pool is Pool.RELAXED]
        if not relaxed:
            return _State.NONE
        now_us = int(self._clock.time() * 1e6)
        return _State.THERE if any(e.usable(now_us) for e in relaxed) else _State.AWAY

    def _say(self, before: _State) -> None:
        if self._state is _State.NONE:
            log.info(
                "no relaxed server decodes: colocation.without_relaxed says what offline work does",
                without_relaxed=self._without,
            )
        elif self._state is _State.AWAY:
            log.warning(
                "no relaxed server is in rotation: colocation.without_relaxed says what offline "
                "work does",
                without_relaxed=self._without,
            )
        elif before is not _State.UNKNOWN:
            log.info("a relaxed server decodes again")

    def _say_what_strict_ones_lend(self, decodes: list[Ledger]) -> None:
        """Beside one online request, the shortest step that an offline one could make of it."""
        steps = [e.steps.decode_us(2, 0) for e in decodes if e.steps is not None]
        lends = not steps or len(steps) < len(decodes) or min(steps) <= self._lends_below_us
        if self._lends and not lends:
            log.warning(
                "strict servers lend offline work nothing while they have online work: each step "
                "is predicted to take more than colocation.lend_share of classes.online.tpot_ms",
                step_ms=round(min(steps) / 1e3, 1),
                lends_below_ms=round(self._lends_below_us / 1e3, 1),
            )
        self._lends = lends
