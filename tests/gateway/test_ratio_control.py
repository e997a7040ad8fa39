"""The controller's books: who has changed what, what is asked of whom, and for what load."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from backends.actuators.sglang import SglangTurn
from gateway.core import Core, Rules
from gateway.planning import Control, Mode, Planner
from gateway.ratio_control import RatioControl
from gateway.role_changes import RoleChanges
from policies.clock import VirtualClock
from policies.demand import Demand, Fleet
from policies.events import (
    Arrived,
    Event,
    Finished,
    LoadReport,
    Outcome,
    SwitchOver,
    SwitchWanted,
    WorkerDown,
    WorkerGone,
    WorkerUp,
)
from policies.ratio import Memory, Plan, Static, Why
from policies.steps import Costs
from policies.types import Role, Worker
from tests.gateway.talk import decode, load, online, prefill
from tests.policies.sites import COST

SECOND = 1_000_000
QUIET = Control(policy=Static())


def test_a_switch_that_hangs_and_then_ends_was_out_of_rotation_once() -> None:
    clock = VirtualClock()
    control = RatioControl(Core(Rules()), clock, asyncio.TaskGroup(), SglangTurn(clock))
    for outcome, took_s in ((Outcome.HANGS, 121), (Outcome.DONE, 150)):
        control.decided(0, SwitchOver("d1", Role.PREFILL, outcome, SECOND, took_s * SECOND))
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in control.collect()
        for sample in metric.samples
    }
    assert values["slackwater_role_switches_total", "hangs"] == 1
    assert values["slackwater_role_switch_seconds_total", "drain"] == 1
    assert values["slackwater_role_switch_seconds_total", "switch"] == 149


class Planned:
    """A planner beside its core; it looks every ten seconds."""

    def __init__(self, *others: Worker, control: Control = QUIET, **more: Any) -> None:
        workers = [prefill("a"), prefill("b"), decode("c"), *others]
        self.core = Core(Rules(costs=Costs(default=COST)), workers)
        self.clock = VirtualClock()
        self.asked: list[Event] = []
        changes = RoleChanges(self.core, self.asked.append, **more)
        self.planner = Planner(self.core, self.clock, changes, control)

    def hear(self, *events: Event) -> None:
        """As a driver tells of them: whoever listens hears of them before the core."""
        now_us = round(self.clock.time() * 1e6)
        for event in events:
            self.planner.hear(now_us, event)
        self.core.handle(events, now_us)

    def interval(self, rate_per_s: int, answer_tokens: int) -> float:
        """Ten seconds of requests that are answered at once; the rate to be ready for then."""
        for number in range(10 * rate_per_s):
            self.clock.run(self.clock.time() + 1 / rate_per_s)
            now_us = round(self.clock.time() * 1e6)
            job = online(f"{now_us}-{number}", at_us=now_us)
            self.planner.hear(now_us, Arrived(job))
            self.planner.hear(now_us, Finished(job.id, answer_tokens))
        self.planner.tick()
        assert self.planner.last is not None
        return self.planner.last.demand.online.rate_per_s

    def is_held(self) -> bool:
        self.clock.run(self.clock.time() + 10)
        self.planner.tick()
        assert self.planner.last is not None
        return self.planner.last.is_held


@pytest.mark.parametrize("goes", [True, False])
def test_a_server_that_was_started_anew_has_not_been_switched_by_another(goes: bool) -> None:  # noqa: FBT001
    planned = Planned()
    planned.hear(LoadReport("b", load()))
    if goes:
        planned.hear(WorkerGone("b"))
    planned.hear(WorkerUp(decode("b")), LoadReport("b", load()))
    assert planned.is_held() is not goes


def test_what_a_server_says_first_is_no_change_whatever_it_is_configured_as() -> None:
    planned = Planned()
    planned.hear(WorkerUp(prefill("d")), WorkerDown("d"))
    planned.hear(WorkerUp(decode("d")), LoadReport("d", load()))
    planned.hear(LoadReport("d", load()))
    assert not planned.is_held()
    planned.hear(WorkerUp(prefill("d")), LoadReport("d", load()))
    assert planned.is_held()


def test_another_server_of_a_known_name_has_not_been_switched_by_another() -> None:
    planned = Planned()
    planned.hear(LoadReport("b", load()))
    elsewhere = replace(decode("b"), url="http://elsewhere:1")
    planned.hear(WorkerUp(elsewhere), LoadReport("b", load()))
    planned.hear(LoadReport("b", load()))
    assert not planned.is_held()


def test_peaks_of_short_requests_are_no_measure_for_long_ones() -> None:
    ready_for = []
    for answer_tokens in (20, 2000):
        planned = Planned()
        for rate in (5, 40, 5, 5, 40, 5, 40, 5):
            planned.interval(rate, 20)
        ready_for += [planned.interval(5, answer_tokens) for _ in range(6)][-1:]
    assert ready_for[0] > 7.0
    assert 5.0 <= ready_for[1] < 7.0


class OneDecode:
    """All the others are to prefill."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        servers = fleet.prefills + fleet.decodes
        return memory, Plan(prefills=servers - 1, decodes=1, why=Why.SHORT_OF_PREFILL)


@pytest.mark.parametrize(("at_once", "asked"), [(None, 3), (2, 2), (1, 1)])
def test_no_server_is_emptied_that_would_wait_for_another_ones_change(
    at_once: int | None, asked: int
) -> None:
    control = Control(policy=OneDecode(), mode=Mode.ACT)
    planned = Planned(decode("d"), decode("e"), decode("f"), control=control, at_once=at_once)
    planned.is_held()
    assert len(planned.asked) == asked
    planned.hear(*planned.asked)
    planned.is_held()
    assert len(planned.asked) == asked


def test_a_server_that_was_refused_is_asked_where_there_is_no_other_one() -> None:
    control = Control(policy=OneDecode(), mode=Mode.ACT)
    told = Planned(decode("d"), decode("e"), control=control, comes_last=lambda name: name == "e")
    told.is_held()
    assert [it.worker for it in told.asked if isinstance(it, SwitchWanted)] == ["d", "c"]
