"""How much offline load a system takes before online suffers: one curve for each trace and seed."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import structlog

from benchmarks.coloc_budget import fitted
from benchmarks.coloc_systems import (
    DECODES,
    PREFILLS,
    TTFT_MS,
    System,
    Traffic,
    fleets,
    offline,
    told,
)
from benchmarks.fluid import Bound, Mix, Servers, Targets, bound
from gateway.scenario import PolicyEntry, Scenario, Sweep, Swept
from gateway.simulation.asks import prepared
from gateway.simulation.budget import BudgetEntry
from gateway.simulation.fleet import servers_of
from gateway.simulation.plan import Plan, planned
from gateway.simulation.records import Ended, Record, RunFacts
from gateway.simulation.world import Case, World
from policies.types import Kind, Role

T = TypeVar("T")

DRAIN_S = 30.0
LOADS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
"""Offered offline requests, as shares of what the fluid bound serves; the last is a backlog."""
QUICK_LOADS = (0.15, 0.35, 0.6, 0.9, 1.2)
AUTHORS, STRICTER = 0.03, 0.005
"""The authors' line for online violations; and ours, beside what online alone violates."""
LOOK_EVERY = 8
"""Of the ticks of a run: whether it has missed too much already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run."""

    load: float
    """Or the share of the target that is the budget, where that is searched."""
    offered_per_s: float
    violations: float
    ttft_violations: float
    tpot_violations: float
    tokens_per_s: float
    """Offline tokens generated while online requests came."""
    requests_per_s: float
    """Offline answers that ended meanwhile."""
    wasted: float
    """Tokens computed for nothing, beside those of offline prompts and answers that counted."""
    preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What one system does under one trace with one seed."""

    traffic: str
    system: str
    seed: int
    alone: float
    """Violations of online requests without any offline load."""
    points: tuple[Point, ...] = ()

    def most(self, limit: float) -> Point | None:
        """The most offline throughput among the runs within the limit."""
        kept = [it for it in self.points if it.violations <= limit]
        return max(kept, key=lambda it: it.tokens_per_s, default=None)

    @property
    def stricter_limit(self) -> float:
        return self.alone + STRICTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    traffic: Traffic
    system: System
    seed: int
    unit_per_s: float
    """Offline requests per second at load 1."""
    alone: float
    counted: int
    """Online requests that come after the warm-up."""
    loads: Sequence[float]
    data: Path

    @property
    def limits(self) -> tuple[float, float]:
        """Of online violations: the stricter one, and the authors'."""
        return self.alone + STRICTER, max(AUTHORS, self.alone)


def scenario_of(traffic: Traffic, policy: PolicyEntry, rate: float) -> Scenario:
    workload = (*traffic.online, offline(rate)) if rate else traffic.online
    return Scenario(
        name=traffic.key,
        warm_up_s=traffic.warm_up_s,
        duration_s=traffic.duration_s,
        drain_s=DRAIN_S,
        fleet=fleets(traffic.strict),
        workload=workload,
        policy=(told(policy, traffic),),
    )


class Lost(Exception):
    """A run has missed more targets than any limit allows: the rest of it changes nothing."""


@dataclass(slots=True)
class Spared:
    """Ends a run once it is lost; hears its ticks."""

    traffic: Traffic
    most: float
    """Online requests that may miss their targets."""
    records: Mapping[str, Record]
    ticks: int = 0
    missed: int = 0

    def tick(self, share: float) -> None:
        self.ticks += 1
        if self.ticks % LOOK_EVERY:
            return
        now_us = round(share * self.traffic.duration_s * 1e6)
        from_us = round(self.traffic.warm_up_s * 1e6)
        self.missed = sum(
            has_missed(it, now_us)
            for it in self.records.values()
            if it.kind is Kind.ONLINE and it.arrival_us >= from_us
        )
        if self.missed > self.most:
            raise Lost


def has_missed(record: Record, now_us: int) -> bool:
    """For certain, whatever comes."""
    if record.ended is not Ended.UNFINISHED:
        return not record.keeps_all
    seen_us = now_us if record.first_us is None else record.first_us
    return seen_us - record.arrival_us > record.ttft_target_us


def point(task: Task, plan: Plan, load: float) -> Point:
    """A run that is lost has at least the violations it had when that was seen."""
    case = case_of(task, plan.scenario.policy[0], load)
    rate = case.load * task.unit_per_s
    world = World(plan, case, lambda share: spared.tick(share))
    spared = Spared(task.traffic, max(task.limits) * task.counted, world.records)
    try:
        ran = world.run()
    except Lost:
        return lost(load, rate, spared.missed / task.counted)
    return measured(ran.facts, ran.records, load, rate)


def case_of(task: Task, policy: PolicyEntry, load: float) -> Case:
    """Where budgets are searched, `load` is one, as a share of the target for a token."""
    if not task.system.budgets:
        return Case(policy=policy, load=load, seed=task.seed)
    budget = replace(policy.budget, ms=load * task.traffic.tpot_ms)
    backlog = max(task.loads)
    return Case(policy=replace(policy, budget=budget), load=backlog, seed=task.seed)


def lost(load: float, rate: float, violations: float) -> Point:
    return Point(
        load=load,
        offered_per_s=rate,
        violations=violations,
        ttft_violations=0.0,
        tpot_violations=0.0,
        tokens_per_s=0.0,
        requests_per_s=0.0,
        wasted=0.0,
    )


def measured(facts: RunFacts, records: Sequence[Record], load: float, rate: float) -> Point:
    online = [it for it in records if it.kind is Kind.ONLINE and it.arrival_us >= facts.from_us]
    batch = [it for it in records if it.kind is Kind.OFFLINE]
    seconds = facts.until_us / 1e6
    ended = [it for it in batch if it.has_finished and (it.last_us or 0) < facts.until_us]
    useful = sum(it.computed_tokens + it.generated for it in batch)
    wasted = sum(it.wasted_tokens for it in batch)
    return Point(
        load=load,
        offered_per_s=rate,
        violations=_missed(it.keeps_all for it in online),
        ttft_violations=_missed(it.keeps_ttft for it in online),
        tpot_violations=_missed(it.keeps_tpot for it in online),
        tokens_per_s=sum(it.tokens_between(0, facts.until_us) for it in batch) / seconds,
        requests_per_s=len(ended) / seconds,
        wasted=wasted / (useful - wasted) if useful > wasted else 0.0,
        preemptions=sum(it.preemptions for it in batch),
    )


def _missed(kept: Iterable[bool]) -> float:
    all_kept = list(kept)
    return 1 - sum(all_kept) / len(all_kept)


def planned_for(task: Task) -> Plan:
    """Its files are read once: loads multiply the offline rate."""
    policy = task.system.policy
    if task.system.budgets:
        policy = replace(policy, budget=profiled(task))
    scenario = scenario_of(task.traffic, policy, task.unit_per_s)
    return planned(replace(scenario, sweep=Sweep(of=Swept.OFFLINE)), task.data)


def profiled(task: Task) -> BudgetEntry:
    fleet = next(it for it in fleets(task.traffic.strict) if it.name == task.system.policy.fleet)
    server = servers_of(fleet, task.data)[-1]
    return fitted(server.times, stalls=server.config.role is Role.UNIFIED)


def curve(task: Task) -> Curve:
    """Tries the largest load; if that is too much, halves the interval; then looks beyond.

    The search ends at a load that is kept while the next two are not, at both limits.
    """
    found: dict[int, Point] = {}
    plan = planned_for(task)
    levels = task.system.budgets or task.loads

    def at(index: int) -> Point:
        if index not in found:
            found[index] = point(task, plan, levels[index])
        return found[index]

    for limit in task.limits:
        _search(at, len(levels), limit)
    return Curve(
        traffic=task.traffic.key,
        system=task.system.key,
        seed=task.seed,
        alone=task.alone,
        points=tuple(found[index] for index in sorted(found)),
    )


def _search(at: Callable[[int], Point], count: int, limit: float) -> None:
    def kept(index: int) -> bool:
        return at(index).violations <= limit

    low, high = -1, count - 1
    if kept(high):
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    beyond = high + 1
    while beyond < count - 1 and kept(beyond):
        beyond += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What is known of one trace and seed before any system is tried."""

    traffic: str
    seed: int
    alone: Point
    online: int
    counted: int
    """Of these, the ones that come after the warm-up."""
    bounds: dict[float, Bound]
    """By the share of online requests that may miss their targets."""
    median_tpot_ms: float
    source: str

    @property
    def unit_per_s(self) -> float:
        """Offline requests that are offered at load 1: what the bound serves."""
        return self.bounds[min(self.bounds)].requests_per_s


def ground(traffic: Traffic, reference: PolicyEntry, seed: int, data: Path) -> Ground:
    """Online alone, and the fluid bounds at both limits."""
    plan = planned(scenario_of(traffic, reference, 0.0), data)
    ran = World(plan, Case(policy=reference, load=1.0, seed=seed)).run()
    alone = measured(ran.facts, ran.records, 0.0, 0.0)
    limits = (alone.violations + STRICTER, max(AUTHORS, alone.violations))
    return Ground(
        traffic=traffic.key,
        seed=seed,
        alone=alone,
        online=len(ran.records),
        counted=sum(it.arrival_us >= ran.facts.from_us for it in ran.records),
        bounds={limit: fluid(traffic, reference, seed, limit, data) for limit in limits},
        median_tpot_ms=usual_tpot_ms(ran.records),
        source=ran.sources[0],
    )


def usual_tpot_ms(records: Sequence[Record]) -> float:
    """The median over time: of each second's mean over the answers that came then."""
    paces: dict[int, list[float]] = {}
    for it in records:
        if it.tpot_us is not None and it.first_us is not None and it.last_us is not None:
            for second in range(it.first_us // 1_000_000, it.last_us // 1_000_000 + 1):
                paces.setdefault(second, []).append(it.tpot_us / 1e3)
    return statistics.median(statistics.fmean(of_one) for of_one in paces.values())


def fluid(traffic: Traffic, reference: PolicyEntry, seed: int, missing: float, data: Path) -> Bound:
    plan: Plan = planned(scenario_of(traffic, reference, 20.0), data)
    *chats, batch = (list(it.asks) for it in prepared(plan, 1.0, seed).streams)
    online = sorted(ask for chat in chats for ask in chat)
    decode = servers_of(plan.scenario.fleet[0], data)[-1]
    servers = Servers(
        prefills=PREFILLS,
        decodes=DECODES,
        times=decode.times,
        kv_tokens=decode.config.kv_tokens,
        max_running=decode.config.max_running,
    )
    return bound(
        servers,
        online,
        Mix.of(batch, servers),
        Targets(ttft_s=TTFT_MS / 1e3, tpot_s=traffic.tpot_ms / 1e3),
        from_s=0.0,
        until_s=traffic.duration_s,
        missing=round(missing * len(online)),
    )


def quiet() -> None:
    """A gateway tells of each preemption: thousands in a run that nobody reads."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def grounds(
    wanted: Sequence[tuple[Traffic, PolicyEntry, int, Path]], processes: int
) -> Iterator[Ground]:
    return _each(ground, wanted, processes)


def in_turn(tasks: Sequence[Task], processes: int) -> Iterator[Curve]:
    return _each(curve, [(task,) for task in tasks], processes)


def _each(work: Callable[..., T], given: Sequence[tuple[Any, ...]], processes: int) -> Iterator[T]:
    """In the order in which they end."""
    if processes < 2:
        quiet()
        yield from (work(*it) for it in given)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=quiet) as pool:
        for done in as_completed([pool.submit(work, *it) for it in given]):
            yield done.result()
