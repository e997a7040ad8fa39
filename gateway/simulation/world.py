"""One run: the core and the driver that serve live traffic, on a virtual clock, before engines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from backends.actuators.simulated import SimulatedActuator
from backends.engine import Engine
from backends.simulated import Delays, Grid, SimulatedBackend, load_of
from backends.workload import Ask
from gateway.core import Core, Rules
from gateway.driver import Driver
from gateway.planning import URGENT_S, Look, Planner
from gateway.role_changes import RoleChanges
from gateway.rulebook import control_of, rules_of
from gateway.scenario import CLOSED, FleetEntry, PolicyEntry
from gateway.simulation.asks import Stream, opened, prefixes_of, prepared
from gateway.simulation.doors import DOORS
from gateway.simulation.entrance import Entrance
from gateway.simulation.fleet import ServerPlan, engines_of, servers_of, worker_for
from gateway.simulation.moves import Moved
from gateway.simulation.oracles import ORACLES, answer_left
from gateway.simulation.plan import Plan
from gateway.simulation.recorder import Recorder
from gateway.simulation.records import Ended, Record, RunFacts
from policies.clock import VirtualClock
from policies.demand import Targets
from policies.events import Decision, Event, FirstToken, LoadReport, SwitchOver, WorkerUp
from policies.registry import PLACE
from policies.types import Kind, Worker

SAMPLES = 240
"""Points of a timeline while requests arrive."""
GATEWAY_ONLINE, GATEWAY_OFFLINE = "online, in the gateway", "offline, in the gateway"

Tick = Callable[[float], object]
"""Told how much of the run is done, from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One cell of the comparison."""

    policy: PolicyEntry
    load: float
    seed: int


@dataclass(slots=True)
class Timeline:
    """How many requests were where; each series has a value for each time."""

    times_s: list[float] = field(default_factory=list)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    running: dict[str, list[int]] = field(default_factory=dict)

    def add(self, now_s: float, waiting: dict[str, int], running: dict[str, int]) -> None:
        self.times_s.append(now_s)
        for series, values in ((self.waiting, waiting), (self.running, running)):
            for name, value in values.items():
                series.setdefault(name, []).append(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What one run leaves."""

    facts: RunFacts
    records: list[Record]
    timeline: Timeline
    sources: tuple[str, ...]
    """Where the step times of its servers come from."""
    looks: list[Look]
    """Of the ratio controller, where there is one."""
    moves: list[Moved]
    """What came of them."""


class World:
    """Everything of one run, on one clock."""

    def __init__(self, plan: Plan, case: Case, tick: Tick | None = None) -> None:
        scenario, delays = plan.scenario, plan.scenario.gateway
        self._plan, self._case, self._tick = plan, case, tick
        self._until_s = plan.until_s(case.load)
        self._virtual = VirtualClock()
        self._clock = Grid(self._virtual)
        self._fleet: FleetEntry = scenario.fleet_of(case.policy)
        self._servers: list[ServerPlan] = servers_of(self._fleet, plan.data)
        noise = Random(f"{case.seed}/steps")
        self._engines: list[Engine] = engines_of(self._servers, self._fleet, self._clock, noise)
        self._backend = SimulatedBackend(
            self._engines,
            self._clock,
            Delays(
                request_s=delays.request_ms / 1e3,
                answer_s=delays.answer_ms / 1e3,
                tick_s=delays.tick_ms / 1e3,
            ),
            _first_token_s(case.policy),
        )
        self._recorder = Recorder(self._ended)
        self._by_prefix = PLACE[case.policy.policies.place]().by_prefix
        self._looks: list[Look] = []
        self._moves: list[Moved] = []
        self._core = Core(self._rules(), self._first_workers())
        self._actuator = self._new_actuator()
        self._planner = self._new_planner()
        self._driver = Driver(
            self._core,
            self._clock,
            self._backend,
            self._decided,
            actuator=self._actuator,
            listen=None if self._planner is None else self._planner.hear,
        )
        self._entrance = Entrance(
            self._core, self._driver, self._backend, self._clock, case.policy.budget
        )
        self._door = self._entrance.door = DOORS[case.policy.door](self._entrance)
        self._backend.connect(self._heard)
        self._backend.on_leg_end = self._recorder.leg_ended
        self._asks = prepared(plan, case.load, case.seed)
        self._streams = {it.entry.name: it for it in self._asks.streams}
        self._open = 0
        self._coming = 0
        self._last_s = 0.0
        self._timeline = Timeline()

    def run(self) -> Ran:
        """Ends when every request has, or `drain_s` after the last arrival."""
        for stream in self._asks.streams:
            if stream.entry.arrivals == CLOSED:
                for _ in range(stream.clients):
                    self._come(stream, self._pause_s(stream))
            else:
                self._await_next(stream)
        self._join_later()
        self._poll()
        self._plan_on()
        self._sample()
        self._virtual.run(self._until_s + self._plan.scenario.drain_s)
        self._close_books()
        return Ran(
            facts=self._facts(),
            records=list(self._recorder.records.values()),
            timeline=self._timeline,
            sources=tuple(dict.fromkeys(it.times_source for it in self._servers)),
            looks=self._looks,
            moves=self._moves,
        )

    @property
    def records(self) -> Mapping[str, Record]:
        """Of all that came so far, by id; live."""
        return self._recorder.records

    def _rules(self) -> Rules:
        rules = rules_of(self._case.policy.config())
        if (oracle := ORACLES[self._case.policy.oracle]) is None:
            return rules
        records = self._recorder.records
        return replace(rules, order=oracle(lambda job: answer_left(job, records[job.id])))

    # Arrivals.

    def _await_next(self, stream: Stream) -> None:
        """Only the next request of a stream is on the clock."""
        ask = next(stream.asks, None)
        if ask is not None:
            self._coming += 1
            self._clock.call_at(ask.arrival_s, self._next_arrives, stream, ask)

    def _next_arrives(self, stream: Stream, ask: Ask) -> None:
        self._coming -= 1
        self._arrive(stream, ask)
        self._await_next(stream)

    def _come(self, stream: Stream, after_s: float) -> None:
        """A client's next request, while requests come at all."""
        when = self._clock.time() + after_s
        if when < self._until_s and (ask := next(stream.asks, None)) is not None:
            self._coming += 1
            self._clock.call_at(when, self._client_asks, stream, ask)

    def _client_asks(self, stream: Stream, ask: Ask) -> None:
        self._coming -= 1
        self._arrive(stream, ask)

    @staticmethod
    def _pause_s(stream: Stream) -> float:
        mean_s = stream.entry.think_s
        return stream.random.expovariate(1 / mean_s) if mean_s else 0.0

    def _arrive(self, stream: Stream, ask: Ask) -> None:
        job, work, record = opened(stream, ask, self._now_us(), self._asks.room)
        if self._by_prefix:
            job = job._replace(prefixes=prefixes_of(work.prompt))
        self._recorder.records[job.id] = record
        self._open += 1
        if not self._case.policy.tells_classes:
            job = job._replace(kind=Kind.ONLINE)
        self._entrance.open(job, work)
        self._door.arrived(job)

    def _ended(self, record: Record) -> None:
        self._open -= 1
        self._entrance.close(record.id)
        self._door.ended(record.id)
        self._last_s = self._clock.time()
        stream = self._streams[record.workload]
        if stream.entry.arrivals == CLOSED:
            self._come(stream, self._pause_s(stream))

    @property
    def _is_over(self) -> bool:
        return not self._open and not self._coming

    # Who moves servers.

    def _new_actuator(self) -> SimulatedActuator:
        plans = {plan.config.name: plan for plan in self._servers}
        return SimulatedActuator(
            self._engines,
            self._clock,
            lambda engine: worker_for(engine, plans[engine.name]),
            gpus={name: plan.gpus for name, plan in plans.items()},
            paid_from_s={name: plan.paid_from_s for name, plan in plans.items()},
            launch_s=self._fleet.launch_s,
        )

    def _new_planner(self) -> Planner | None:
        """The targets are the strictest of all online workloads."""
        online = [it for it in self._plan.scenario.workload if it.kind is Kind.ONLINE]
        targets = Targets(
            ttft_s=min((it.ttft_ms for it in online), default=2000.0) / 1e3,
            tpot_s=min((it.tpot_ms for it in online), default=100.0) / 1e3,
        )
        control = control_of(self._case.policy.ratio, targets)
        if control is None:
            return None
        gpus = {plan.config.name: plan.gpus for plan in self._servers}
        elastic = any(plan.entry.parked for plan in self._servers)
        control = replace(
            control,
            budget_gpus=sum(gpus.values()) if elastic else 0,
            switch_s=max(plan.entry.role_switch_s for plan in self._servers),
            launch_s=self._fleet.launch_s,
        )
        size = self._actuator if elastic else None
        return Planner(
            self._core,
            self._clock,
            RoleChanges(self._core, lambda event: self._driver.post(event), size=size),
            control,
            gpus=lambda worker: gpus[worker.name],
            told=self._looks.append,
        )

    def _plan_on(self) -> None:
        if self._planner is not None and not self._is_over:
            self._clock.call_at(self._clock.time() + URGENT_S, self._plan_once)

    def _plan_once(self) -> None:
        if self._planner is not None:
            self._planner.tick()
        self._plan_on()

    # Between servers, core and records.

    def _decided(self, now_us: int, decision: Decision) -> None:
        self._recorder.decided(now_us, decision)
        if isinstance(decision, SwitchOver):
            self._moves.append(Moved.of(decision, now_us))
        if self._planner is not None:
            self._planner.decided(decision)

    def _now_us(self) -> int:
        return round(self._clock.time() * 1e6)

    def _heard(self, event: Event) -> None:
        self._recorder.heard(event, self._now_us())
        if isinstance(event, FirstToken):
            self._door.first_token(event.job_id)
        self._driver.post(event)

    def _first_workers(self) -> list[Worker]:
        pairs = zip(self._engines, self._servers, strict=True)
        return [
            worker_for(engine, plan)
            for engine, plan in pairs
            if not (plan.serves_from_s or plan.entry.parked)
        ]

    def _join_later(self) -> None:
        for engine, plan in zip(self._engines, self._servers, strict=True):
            if plan.serves_from_s:
                event = WorkerUp(worker_for(engine, plan))
                self._clock.call_at(plan.serves_from_s, self._driver.post, event)

    def _poll(self) -> None:
        """Loads are told some time after they were true."""
        gateway, now_us = self._plan.scenario.gateway, self._now_us()
        told = [LoadReport(engine.name, load_of(engine, now_us)) for engine in self._engines]
        now_s = self._clock.time()
        self._clock.call_at(now_s + gateway.report_age_ms / 1e3, self._tell, told)
        if not self._is_over:
            self._clock.call_at(now_s + gateway.poll_ms / 1e3, self._poll)

    def _tell(self, reports: list[LoadReport]) -> None:
        for report in reports:
            self._driver.post(report)

    # Books.

    def _sample(self) -> None:
        waiting: dict[str, int] = {
            GATEWAY_ONLINE: self._core.queued(Kind.ONLINE),
            GATEWAY_OFFLINE: self._core.queued(Kind.OFFLINE),
        }
        running: dict[str, int] = {}
        for engine, plan in zip(self._engines, self._servers, strict=True):
            where = f"{engine.role} servers, {plan.entry.pool}"
            inside, decoding = len(engine.machine.live), len(engine.machine.batch)
            waiting[where] = waiting.get(where, 0) + inside - decoding
            running[where] = running.get(where, 0) + decoding
        now_s = self._clock.time()
        self._timeline.add(now_s, waiting, running)
        if self._tick is not None:
            self._tick(min(1.0, now_s / self._until_s))
        if not self._is_over:
            self._clock.call_at(now_s + self._until_s / SAMPLES, self._sample)

    def _close_books(self) -> None:
        """What still runs has what it has got so far."""
        now_us = self._now_us()
        for record in self._recorder.records.values():
            if record.ended is Ended.UNFINISHED:
                self._last_s = now_us / 1e6
                record.generated += self._backend.generated(record.id)
                record.last_us = now_us if record.first_us is not None else None

    def _facts(self) -> RunFacts:
        ended_s = max(self._until_s, self._last_s)
        counts = self._asks.counts
        return RunFacts(
            policy=self._case.policy.name,
            load=self._case.load,
            seed=self._case.seed,
            from_us=round(self._plan.scenario.warm_up_s * 1e6),
            until_us=round(self._until_s * 1e6),
            ended_us=round(ended_s * 1e6),
            gpu_s=self._actuator.gpu_s(ended_s),
            requests=len(self._recorder.records),
            skipped_rows=counts.skipped_rows,
            too_large=counts.too_large,
            cut_answers=counts.cut_answers,
            switched=self._actuator.switched,
            launched=self._actuator.launched,
            released=self._actuator.released,
        )


def _first_token_s(policy: PolicyEntry) -> Mapping[Kind, float]:
    """A gateway's own; what stands in its place in a comparison has no such limit."""
    if policy.door != "open":
        return dict.fromkeys(Kind, math.inf)
    timeouts = policy.config().timeouts
    return {
        Kind.ONLINE: timeouts.first_token_online_s,
        Kind.OFFLINE: timeouts.first_token_offline_s,
    }
