"""The ratio controller of a live gateway: its loop, its log lines and its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from backends.actuators.turning import Hindrance
from backends.base import Size
from backends.pause import pause
from gateway.config import Config, tp_of
from gateway.core import Core
from gateway.driver import Driver
from gateway.planning import URGENT_S, Control, Look, Mode, Planner
from gateway.reach import Reach
from gateway.refusals import Refusals
from gateway.rulebook import control_of
from gateway.shortage import Shortage
from policies.clock import Clock
from policies.demand import Targets
from policies.events import Decision, Outcome, SwitchOver
from policies.forecast import LAST
from policies.types import Role

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


async def _none() -> Hindrance | None:
    return None


class RatioControl(Collector):
    """Nothing but a name while `ratio.policy` is static."""

    def __init__(
        self,
        core: Core,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        *,
        size: Size | None = None,
        hindrance: Callable[[], Awaitable[Hindrance | None]] = _none,
    ) -> None:
        """`hindrance`: the actuator's, asked before anything is done."""
        self._core = core
        self._clock = clock
        self._tasks = tasks
        self._size = size
        self._loop: asyncio.Task[None] | None = None
        self._planner: Planner | None = None
        self._reach = Reach(hindrance, clock)
        self._refusals = Refusals(clock)
        self._shortage = Shortage()
        self._wish: Look | None = None
        """What is to be done as soon as the actuator has answered."""
        self._told: tuple[Undone, int, int] | None = None
        """What was said last and not done."""
        self._info = {"policy": "static", "mode": "advise", "actuator": "sglang"}
        self._outcomes: dict[Outcome, int] = {}
        self._drained_s = self._took_s = 0.0
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
        planner = Planner(
            self._core,
            self._clock,
            driver.post,
            control,
            gpus=lambda worker: self._tp.get(worker.name, self._tp[""]),
            size=self._size,
            told=self._look,
            ask_first=self._wished,
            comes_last=self._refusals.was_refused,
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
        self._loop = self._planner = self._told = self._wish = None
        self._shortage = Shortage()

    def decided(self, now_us: int, decision: Decision) -> None:
        if isinstance(decision, SwitchOver):
            self._over(decision)
        elif self._planner is not None:
            self._planner.decided(decision)

    def _over(self, over: SwitchOver) -> None:
        self._refusals.over(over)
        self._outcomes[over.outcome] = self._outcomes.get(over.outcome, 0) + 1
        if over.outcome is not Outcome.HANGS:  # its end will be told, too
            self._drained_s += over.drained_us / 1e6
            self._took_s += over.took_us / 1e6
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
            self._say_once(look, Undone.ADVISES)
        elif look.wants_change and look.is_held:
            self._say_once(look, Undone.HELD)

    def _wished(self, look: Look) -> None:
        self._wish = look

    async def _act(self, planner: Planner) -> None:
        look, self._wish = self._wish, None
        if look is None:
            return
        if (undone := await self._undone(look, planner)) is not None:
            self._say_once(look, undone)
            return
        self._told = None
        self._say(look, acts=True)

    async def _undone(self, look: Look, planner: Planner) -> Undone | None:
        """No server is emptied for somebody who does not answer, or does not do it; None: done."""
        if self._refusals.waits and min(look.fleet.prefills, look.fleet.decodes) > 0:
            return Undone.REFUSED
        if await self._reach.lost():
            return Undone.AWAY
        if not self._acts:  # a reload was faster
            return Undone.ADVISES
        return None if planner.act(look) else Undone.NOBODY_FREE

    def _say_once(self, look: Look, undone: Undone) -> None:
        plan = look.plan
        wish = (plan.prefills, plan.decodes) if undone in SAID_EACH else (0, 0)
        if (undone, *wish) != self._told:
            self._told = (undone, *wish)
            self._say(look, acts=False)

    def _say(self, look: Look, *, acts: bool) -> None:
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

    @property
    def _acts(self) -> bool:
        return self._planner is not None and self._planner.control.mode is Mode.ACT

    # Metrics.

    def collect(self) -> Iterator[Metric]:
        switches = CounterMetricFamily(
            "slackwater_role_switches", "Role switches by how they ended", labels=["outcome"]
        )
        for outcome, count in self._outcomes.items():
            switches.add_metric([outcome.value], count)
        yield switches
        seconds = CounterMetricFamily(
            "slackwater_role_switch_seconds", "Time out of rotation", labels=["part"]
        )
        seconds.add_metric(["drain"], self._drained_s)
        seconds.add_metric(["switch"], self._took_s - self._drained_s)
        yield seconds
        yield _gauge(
            "slackwater_ratio_moves", "Switches under way", len(self._core.switching.moves)
        )
        info = GaugeMetricFamily(
            "slackwater_ratio_info", "What decides, and who changes servers", labels=[*self._info]
        )
        info.add_metric([*self._info.values()], 1)
        yield info
        held = reached = None
        serving: dict[Role, int] = {}
        if (planner := self._planner) is not None:
            held = planner.is_held(round(self._clock.time() * 1e6))
            reached = self._reach.answers
            serving = {it: len(planner.serving(it)) for it in (Role.PREFILL, Role.DECODE)}
        yield _gauge("slackwater_ratio_held", "1: stands back from somebody else's change", held)
        yield _gauge("slackwater_ratio_actuator_up", "0: it did not answer when asked", reached)
        yield from _of_look(None if planner is None else planner.last, serving)


def _gauge(name: str, words: str, value: float | None) -> Metric:
    """Without a value it is named, and nothing is said of it."""
    return GaugeMetricFamily(name, words, value=value)


def _of_look(look: Look | None, serving: Mapping[Role, int]) -> Iterator[Metric]:
    """As of the last look, but for what serves."""
    servers = GaugeMetricFamily(
        "slackwater_ratio_servers", "Servers of each role", labels=["role", "which"]
    )
    rate = GaugeMetricFamily(
        "slackwater_ratio_rate_per_s", "Online requests a second", labels=["which"]
    )
    errors = GaugeMetricFamily(
        "slackwater_forecast_error", "Errors over load, of late", labels=["by"]
    )
    if look is not None:
        wanted = {Role.PREFILL: look.plan.prefills, Role.DECODE: look.plan.decodes}
        need = {} if look.need is None else dict(zip(wanted, look.need, strict=True))
        for which, counts in (("had", serving), ("wanted", wanted), ("need", need)):
            for role, count in counts.items():
                servers.add_metric([role.value, which], count)
        rate.add_metric([LAST], look.forecast.last)
        rate.add_metric(["forecast"], look.forecast.point)
        rate.add_metric(["upper"], look.forecast.upper)
        for name, error in look.forecast.errors.items():
            errors.add_metric([name], error)
    yield from (servers, rate, errors)
