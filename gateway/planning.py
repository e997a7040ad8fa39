"""The ratio controller: looks at the load, asks the policy, and has servers moved, or says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gateway.coming import Coming
from gateway.core import Core
from gateway.expected import Expected
from gateway.other_hands import OtherHands
from gateway.role_changes import RoleChanges
from policies.clock import Clock
from policies.demand import Demand, Fleet, Site, Targets
from policies.dopd_plus import DopdPlus
from policies.events import (
    Decision,
    Event,
    Fail,
    Reject,
    WorkerUp,
)
from policies.forecast import Prediction
from policies.ledger import Ledger
from policies.monitor import Seen
from policies.ratio import Memory, Plan, Ratio
from policies.types import Kind, Role, Worker

URGENT_S = 1.0
"""How often it is asked whether something is urgent between two looks."""


class Mode(StrEnum):
    ADVISE = "advise"
    """What would be done is logged and counted."""
    ACT = "act"


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What a controller is told by its operator."""

    policy: Ratio
    mode: Mode = Mode.ADVISE
    interval_s: float = 10.0
    quantile: float = 0.9
    targets: Targets = field(default_factory=Targets)
    budget_gpus: int = 0
    switch_s: float = 5.0
    launch_s: float = 45.0
    lease_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look, for metrics and logs."""

    now_us: int
    demand: Demand
    fleet: Fleet
    plan: Plan
    forecast: Prediction
    is_held: bool = False
    """Somebody else has changed roles of late."""

    @property
    def wants_change(self) -> bool:
        have = (self.fleet.prefills, self.fleet.decodes)
        return (self.plan.prefills, self.plan.decodes) != have

    @property
    def need(self) -> tuple[int, int] | None:
        """The fewest prefill and decode servers that keep the targets, whatever there is. Of a role
        that no fleet has enough of, one more than there can be. None: the policy does not say."""
        terms = self.plan.terms
        if "need_prefills" not in terms or "need_decodes" not in terms:
            return None
        return int(terms["need_prefills"]), int(terms["need_decodes"])


class Planner:
    """One for all servers of a fleet; every look is a value that others may read."""

    def __init__(
        self,
        core: Core,
        clock: Clock,
        changes: RoleChanges,
        control: Control,
        *,
        gpus: Callable[[Worker], int] = lambda _: 1,
        told: Callable[[Look], object] = lambda _: None,
        ask_first: Callable[[Look], object] | None = None,
    ) -> None:
        """`ask_first` gets what is to be done, and calls `act` if it can be; None: it can."""
        self._core = core
        self._clock = clock
        self._changes = changes
        self._gpus = gpus
        self._told = told
        self._act = ask_first or self.act
        self._memory = Memory()
        self._sites: dict[Role, Site] = {}
        self._looked_us = self._now_us()
        self.expected = Expected(self._looked_us, control.quantile)
        self.control = control
        self.last: Look | None = None
        self.others = OtherHands(core, control.lease_s)
        self._coming = Coming()

    def adopt(self, control: Control) -> None:
        """Other rules from here on; what was seen of the load stays."""
        if control.policy != self.control.policy:
            self._memory = Memory()
        self.expected.adopt(control.quantile)
        self.others.lease_s = control.lease_s
        self.control = control

    def hear(self, now_us: int, event: Event) -> None:
        self.expected.ingress.hear(now_us, event)
        if isinstance(event, WorkerUp) and event.worker.name not in self._core.ledgers:
            self._coming.arrived(event.worker.role)
        self.others.hear(now_us, event)

    def is_held(self, now_us: int) -> bool:
        """Somebody else has changed roles of late."""
        return now_us < self.others.until_us

    def decided(self, decision: Decision) -> None:
        if isinstance(decision, Reject | Fail):
            self.expected.ingress.decided(decision)

    def tick(self) -> None:
        """To be called every URGENT_S: looks when the interval is over, or when it cannot wait."""
        now_us = self._now_us()
        if self._changes.size is not None:
            self._coming.look(self._changes.size.starting, now_us)
        if now_us - self._looked_us >= self.control.interval_s * 1e6:
            self._observe(now_us)
        elif not self._is_urgent(now_us):
            return
        self._look(now_us)

    def _now_us(self) -> int:
        return round(self._clock.time() * 1e6)

    def _observe(self, now_us: int) -> None:
        """The interval that has just ended."""
        control = self.control
        lead_s = control.launch_s if control.budget_gpus else control.switch_s
        self.expected.observe(control.interval_s, lead_s, control.targets.tpot_s, now_us)
        self._looked_us = now_us

    def _is_urgent(self, now_us: int) -> bool:
        policy = self.control.policy
        if not isinstance(policy, DopdPlus) or self.last is None or not self.expected.flows:
            return False
        return policy.is_urgent(self._demand(now_us))

    def _look(self, now_us: int) -> None:
        fleet = self._fleet()
        if fleet is None:
            return
        demand = self._demand(now_us)
        self._memory, plan = self.control.policy.next(self._memory, demand, fleet, now_us)
        forecast = self.expected.forecast(Kind.ONLINE)
        self.last = look = Look(
            now_us=now_us,
            demand=demand,
            fleet=fleet,
            plan=plan,
            forecast=forecast,
            is_held=self.is_held(now_us) and min(fleet.prefills, fleet.decodes) > 0,
        )
        self._told(look)
        if look.wants_change and self.control.mode is Mode.ACT and not look.is_held:
            self._act(look)

    def act(self, look: Look) -> int:
        """How many servers are asked to change, started ones included."""
        return self._changes.ask(look.plan, look.fleet)

    # What is known.

    @property
    def _moving(self) -> int:
        coming = self._coming.count(Role.PREFILL) + self._coming.count(Role.DECODE)
        return len(self._core.switching.moves) + coming

    def _demand(self, now_us: int) -> Demand:
        expected, ingress = self.expected, self.expected.ingress
        online, offline = expected.flows[Kind.ONLINE], expected.flows[Kind.OFFLINE]
        decodes = self.serving(Role.DECODE)
        waiting = ingress.waiting - len(self.serving(Role.PREFILL))
        return Demand(
            online=replace(online, rate_per_s=expected.steady_per_s),
            lasting_per_s=expected.lasting_per_s,
            expected=replace(online, rate_per_s=expected.forecast(Kind.ONLINE).point),
            offline=replace(offline, rate_per_s=expected.forecast(Kind.OFFLINE).point),
            targets=self.control.targets,
            waiting=max(0, waiting),
            waiting_tokens=ingress.waiting_tokens,
            oldest_wait_s=ingress.oldest_wait_s(now_us, len(self._core.ledgers)),
            kv_use=max((_kv_use(it) for it in decodes), default=0.0),
            decode_is_full=all(_is_full(it) for it in decodes),
            resident=sum(it.decodes for it in decodes),
            ttft_s=_seconds(ingress.mean(Seen.TTFT, now_us)),
            tpot_s=_seconds(ingress.mean(Seen.TPOT, now_us)),
            stay_s=_seconds(ingress.mean(Seen.STAY, now_us)),
            idle_s=ingress.monitor.idle_us(now_us) / 1e6,
            interval_s=self.control.interval_s,
        )

    def serving(self, role: Role) -> list[Ledger]:
        return self._changes.serving(role)

    def _fleet(self) -> Fleet | None:
        """None where the hardware of a role is not known."""
        for role in (Role.PREFILL, Role.DECODE):
            if (site := self._site(self.serving(role))) is not None:
                self._sites[role] = site
        if len(self._sites) < 2:
            return None
        control, count = self.control, {}
        for role in (Role.PREFILL, Role.DECODE):
            going = [it for it in self._core.switching.moves.values() if it.wanted.role is role]
            coming = self._coming.count(role)
            count[role] = len(self.serving(role)) + len(going) + coming
        return Fleet(
            prefills=count[Role.PREFILL],
            decodes=count[Role.DECODE],
            prefill=self._sites[Role.PREFILL],
            decode=self._sites[Role.DECODE],
            moving=self._moving,
            budget_gpus=control.budget_gpus,
            switch_s=control.switch_s,
            launch_s=control.launch_s,
        )

    def _site(self, ledgers: Iterable[Ledger]) -> Site | None:
        """The first server whose hardware is known stands for its role."""
        for ledger in ledgers:
            if (steps := ledger.steps) is not None:
                is_prefill = ledger.worker.role is Role.PREFILL
                learnt = steps.prefill if is_prefill else steps.decode
                return Site(
                    cost=steps.cost,
                    gpus=self._gpus(ledger.worker),
                    kv_tokens=ledger.kv_tokens,
                    max_running=ledger.max_running or 256,
                    chunk_tokens=steps.chunk_tokens,
                    factor=learnt.factor,
                )
        return None


def _kv_use(ledger: Ledger) -> float:
    return ledger.context_tokens / ledger.kv_tokens if ledger.kv_tokens else 0.0


FULL = 0.88
"""Of its cache or its seats: admission stops a little later."""


def _is_full(ledger: Ledger) -> bool:
    if ledger.max_running and ledger.decodes >= FULL * ledger.max_running:
        return True
    return bool(ledger.kv_tokens) and ledger.reserved_tokens >= FULL * ledger.kv_tokens


def _seconds(us: float | None) -> float | None:
    return None if us is None else us / 1e6
