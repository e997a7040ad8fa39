from __future__ import annotations

from collections.abc import Callable

import pytest

from backends.base import Post
from gateway.core import Core
from gateway.driver import Driver
from policies.clock import VirtualClock
from policies.events import (
    Arrived,
    Continue,
    Decision,
    Dispatch,
    Fail,
    Fault,
    Finished,
    Freed,
    Left,
    Outcome,
    Pause,
    Preempt,
    Preempted,
    Recall,
    Reject,
    Release,
    SwitchOver,
    SwitchRole,
    SwitchWanted,
)
from policies.types import Job, Role
from tests.gateway.talk import PATIENCE_US, RULES, broke, decode, one_at_a_time, online, pair


class Scripted:
    """Writes down what it is told to do."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.post: Post | None = None

    def connect(self, post: Post) -> None:
        self.post = post

    def start(self, dispatch: Dispatch) -> None:
        self.told.append(("start", dispatch.job.id))

    def preempt(self, decision: Preempt) -> None:
        self.told.append(("preempt", decision.job.id))
        if self.post is not None:
            self.post(Preempted(decision.job.id, 5))

    def stop(self, job: Job) -> None:
        self.told.append(("stop", job.id))
        if self.post is not None:
            self.post(Freed(job.id))

    def pause(self, decision: Pause) -> None:
        self.told.append(("pause", decision.worker))

    def go_on(self, decision: Continue) -> None:
        self.told.append(("go_on", decision.worker))

    def refuse(self, decision: Reject | Fail) -> None:
        self.told.append(("refuse", decision.job.id))


Stage = tuple[VirtualClock, Driver, Scripted, list[tuple[int, Decision]]]


@pytest.fixture
def stage() -> Callable[..., Stage]:
    def make() -> Stage:
        clock, backend, seen = VirtualClock(), Scripted(), []
        core = Core(RULES, one_at_a_time())
        return clock, Driver(core, clock, backend, lambda *it: seen.append(it)), backend, seen

    return make


def test_the_driver_listens_to_its_backend(stage: Callable[..., Stage]) -> None:
    _, driver, backend, _ = stage()
    assert backend.post == driver.post


def test_events_of_one_instant_are_one_call(stage: Callable[..., Stage]) -> None:
    """The more urgent of two that arrive together goes first, whoever came first."""
    clock, driver, backend, _ = stage()
    driver.post(Arrived(online("b")))
    driver.post(Arrived(online("a")))
    assert backend.told == []
    clock.run(0.0)
    assert backend.told == [("start", "a")]


def test_what_a_backend_says_while_it_obeys_comes_next(stage: Callable[..., Stage]) -> None:
    clock, driver, backend, _ = stage()
    driver.post(Arrived(online("a")))
    driver.post(Arrived(online("b")))
    clock.run(0.0)
    driver.post(Left("a"))
    clock.run(0.0)
    assert backend.told == [("start", "a"), ("stop", "a"), ("start", "b")]


def test_a_deadline_is_kept_to_the_microsecond(stage: Callable[..., Stage]) -> None:
    clock, driver, backend, seen = stage()
    driver.post(Arrived(online("a")))
    driver.post(Arrived(online("b")))
    clock.run()
    assert backend.told == [("start", "a"), ("refuse", "b")]
    assert seen[-1][0] == PATIENCE_US


def test_an_earlier_alarm_takes_the_place_of_a_later_one(stage: Callable[..., Stage]) -> None:
    clock, driver, _, seen = stage()
    for job in (online("a"), online("b"), online("c", give_up_us=5_000)):
        driver.post(Arrived(job))
        clock.run(clock.time())
    clock.run()
    refused = [(us, it.job.id) for us, it in seen if isinstance(it, Reject)]
    assert refused == [(5_000, "c"), (PATIENCE_US, "b")]


def test_a_job_that_has_failed_for_good_is_refused(stage: Callable[..., Stage]) -> None:
    clock, driver, backend, seen = stage()
    driver.post(Arrived(online("a")))
    clock.run(0.0)
    driver.post(broke("a", fault=Fault.REQUEST))
    clock.run()
    assert backend.told[-1] == ("refuse", "a")
    assert isinstance(seen[-1][1], Fail)


def test_every_decision_is_seen_with_its_time(stage: Callable[..., Stage]) -> None:
    clock, driver, _, seen = stage()
    clock.call_at(1.5, driver.post, Arrived(online("a", at_us=1_500_000)))
    clock.call_at(2.5, driver.post, Finished("a", 3))
    clock.run()
    assert [(us, type(it)) for us, it in seen] == [(1_500_000, Dispatch)]


def test_a_preempted_job_is_stopped_and_then_started_again(stage: Callable[..., Stage]) -> None:
    clock, driver, backend, seen = stage()
    driver.post(Arrived(online("a")))
    clock.run(0.0)
    driver.post(Recall("a"))
    clock.run(0.0)
    assert backend.told == [("start", "a"), ("preempt", "a"), ("start", "a")]
    last = seen[-1][1]
    assert isinstance(last, Dispatch)
    assert (last.job.prompt_tokens, last.job.max_tokens) == (105, 95)


class Clumsy(Scripted):
    """Cannot start one of the jobs."""

    def start(self, dispatch: Dispatch) -> None:
        super().start(dispatch)
        if dispatch.job.id == "a":
            raise ValueError("a bug")


def test_a_decision_that_cannot_be_carried_out_leaves_no_job_behind() -> None:
    clock, backend = VirtualClock(), Clumsy()
    core = Core(RULES, pair())
    driver = Driver(core, clock, backend)
    driver.post(Arrived(online("a")))
    driver.post(Arrived(online("b")))
    clock.run()
    assert backend.told.count(("start", "b")) == 1
    assert ("refuse", "a") in backend.told
    driver.post(Finished("b", 1))
    clock.run()
    assert len(core) == 0


class Lame:
    """Cannot move a server."""

    def connect(self, post: Post) -> None: ...

    def move(self, decision: SwitchRole | Release) -> None:
        raise ValueError("a bug")


@pytest.mark.parametrize("role", [Role.PREFILL, None])
def test_a_move_that_cannot_be_carried_out_is_over(role: Role | None) -> None:
    clock, seen = VirtualClock(), list[Decision]()
    core = Core(RULES, [*pair(), decode("d2")])
    driver = Driver(core, clock, Scripted(), lambda _, it: seen.append(it), actuator=Lame())
    driver.post(SwitchWanted("d2", role, "spare"))
    clock.run(1.0)
    assert [it.outcome for it in seen if isinstance(it, SwitchOver)] == [Outcome.LOST]


class Stubborn(Scripted):
    """Cannot preempt."""

    def preempt(self, decision: Preempt) -> None:
        raise ValueError("a bug")


def test_a_preemption_that_cannot_be_carried_out_leaves_no_job_behind() -> None:
    clock, backend = VirtualClock(), Stubborn()
    core = Core(RULES, pair())
    driver = Driver(core, clock, backend)
    driver.post(Arrived(online("a")))
    clock.run(0.0)
    driver.post(Recall("a"))
    clock.run(0.0)
    assert backend.told == [("start", "a"), ("start", "a")]
