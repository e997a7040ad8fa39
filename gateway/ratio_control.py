"""The ratio controller of a live gateway: when it looks, and whether it acts on what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import structlog
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from backends.actuators.turning import Turn
from backends.pause import pause
from gateway.config import Config, tp_of
from gateway.core import Core
from gateway.driver import Driver
from gateway.planning import URGENT_S, Control, Look, Mode, Planner
from gateway.ratio_log import RatioLog, Undone
from gateway.ratio_metrics import SwitchTotals, gauge, info_of, of_look
from gateway.reach import Reach
from gateway.refusals import Refusals
from gateway.role_changes import RoleChanges
from gateway.rulebook import control_of
from gateway.shortage import Shortage
from policies.clock import Clock
from policies.demand import Targets
from policies.events import Decision, Outcome, SwitchOver
from policies.types import Role

log = structlog.get_logger("slackwater.ratio")


class RatioControl(Collector):
    """Nothing but a name while `ratio.policy` is static."""

    def __init__(
        self,
        core: Core,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        turn: Turn,
    ) -> None:
        self._core = core
        self._clock = clock
        self._tasks = tasks
        self._turn = turn
        self._loop: asyncio.Task[None] | None = None
        self._planner: Planner | None = None
        self._reach = Reach(turn.hindrance, clock)
        self._refusals = Refusals(clock)
        self._shortage = Shortage()
        self._wish: Look | None = None
        """What is to be done as soon as the actuator has answered."""
        self._log = RatioLog()
        self._info = {"policy": "static", "mode": "advise", "actuator": "sglang"}
        self.switches = SwitchTotals()
        self._tp = {"": 1}
        """GPUs of a server: those of the ones that say so, and of all others."""
        self._switch_s: float | None = None
        """What the last switches took, their draining apart."""

    def adopt(self, config: Config, driver: Driver) -> None:
        """A changed policy begins anew; what was seen of the load stays where it can."""
        online = config.classes.online
        targets = Targets(ttft_s=online.ttft_ms / 1e3, tpot_s=online.tpot_ms / 1e3)
        control = control_of(config.ratio, targets)
        if control is not None and self._switch_s is not None:
            control = replace(control, switch_s=self._switch_s)
        self._tp = tp_of(config)
        ratio = config.ratio
        self._info = {"policy": ratio.policy, "mode": ratio.mode, "actuator": ratio.actuator}
        if self._planner is not None and control is not None:
            self._planner.adopt(control)
            return
        self.close()
        driver.listen = None
        if control is not None:
            self._begin(control, driver)

    def _begin(self, control: Control, driver: Driver) -> None:
        changes = RoleChanges(
            self._core,
            driver.post,
            size=self._turn.size,
            at_once=self._turn.at_once,
            comes_last=self._refusals.was_refused,
        )
        planner = Planner(
            self._core,
            self._clock,
            changes,
            control,
            gpus=lambda worker: self._tp.get(worker.name, self._tp[""]),
            told=self._look,
            ask_first=self._wished,
        )
        self._planner, driver.listen = planner, planner.hear
        self._loop = self._tasks.create_task(self._tick(planner))

    async def _tick(self, planner: Planner) -> None:
        while True:
            await pause(self._clock, URGENT_S)
            try:
                planner.tick()
                await self._act(planner)
            except Exception:  # a bug here must not stop the requests
                log.exception("the ratio controller failed")

    def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        self._loop = self._planner = self._wish = None
        self._shortage, self._log = Shortage(), RatioLog()

    def decided(self, now_us: int, decision: Decision) -> None:
        if isinstance(decision, SwitchOver):
            self._over(decision)
        elif self._planner is not None:
            self._planner.decided(decision)

    def _over(self, over: SwitchOver) -> None:
        self._refusals.over(over)
        self.switches.add(over)
        if over.outcome is Outcome.DONE and over.role is not None:
            self._measured((over.took_us - over.drained_us) / 1e6)
        log.info(
            "role switch",
            worker=over.worker,
            role="none" if over.role is None else over.role.value,
            outcome=over.outcome.value,
            drained_s=over.drained_us / 1e6,
            took_s=over.took_us / 1e6,
            why=over.why,
        )

    def _measured(self, took_s: float) -> None:
        """The policies reckon with it from here on."""
        was_s = self._switch_s
        self._switch_s = took_s if was_s is None else (was_s + took_s) / 2
        if self._planner is not None:
            planner = self._planner
            planner.adopt(replace(planner.control, switch_s=self._switch_s))

    def _look(self, look: Look) -> None:
        self._shortage.look(look)
        if look.wants_change and not self._acts:
            self._log.undone(look, Undone.ADVISES)
        elif look.wants_change and look.is_held:
            self._log.undone(look, Undone.HELD)

    def _wished(self, look: Look) -> None:
        self._wish = look

    async def _act(self, planner: Planner) -> None:
        look, self._wish = self._wish, None
        if look is None:
            return
        undone = await self._undone(look, planner)
        if undone is None:
            self._log.done(look)
        else:
            self._log.undone(look, undone)

    async def _undone(self, look: Look, planner: Planner) -> Undone | None:
        """No server is emptied for somebody who does not answer, or does not do it; None: done."""
        if self._refusals.waits and min(look.fleet.prefills, look.fleet.decodes) > 0:
            return Undone.REFUSED
        if await self._reach.lost():
            return Undone.AWAY
        if not self._acts:  # a reload was faster
            return Undone.ADVISES
        return None if planner.act(look) else Undone.NOBODY_FREE

    @property
    def _acts(self) -> bool:
        return self._planner is not None and self._planner.control.mode is Mode.ACT

    # Metrics.

    def collect(self) -> Iterator[Metric]:
        yield from self.switches.collect()
        yield gauge("slackwater_ratio_moves", "Switches under way", len(self._core.switching.moves))
        yield info_of(self._info)
        held = reached = None
        serving: dict[Role, int] = {}
        if (planner := self._planner) is not None:
            held = planner.is_held(round(self._clock.time() * 1e6))
            reached = self._reach.answers
            serving = {it: len(planner.serving(it)) for it in (Role.PREFILL, Role.DECODE)}
        yield gauge("slackwater_ratio_held", "1: stands back from somebody else's change", held)
        yield gauge("slackwater_ratio_actuator_up", "0: it did not answer when asked", reached)
        yield from of_look(None if planner is None else planner.last, serving)
