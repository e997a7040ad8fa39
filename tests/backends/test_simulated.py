"""Engines behind the driver in virtual time: what the gateway hears of them."""

from __future__ import annotations

from typing import Any

import pytest

from backends.engine import named_prompt
from backends.simulated import Grid, Work, worker_of
from policies.clock import VirtualClock
from policies.events import (
    Dispatch,
    Event,
    Fail,
    Failed,
    Finished,
    FirstToken,
    Freed,
    Left,
    Preempted,
    PrefillDone,
    Progress,
    Reason,
    Recall,
)
from policies.types import Resume, Role
from tests.gateway.talk import offline, online
from tests.simulated_fleet import Fleet, left_over

PAIR = (Role.PREFILL, Role.DECODE)
UNIFIED = (Role.UNIFIED,)


class Heard(Fleet):
    """A fleet whose events are kept on their way to the core."""

    def __init__(self, *roles: Role, **options: Any) -> None:
        self.virtual = VirtualClock()
        super().__init__(self.virtual, roles, **options)
        self.events: list[tuple[int, Event]] = []
        self.backend.connect(self.hear)

    def hear(self, event: Event) -> None:
        self.events.append((round(self.clock.time() * 1e6), event))
        self.driver.post(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for _, event in self.events if isinstance(event, kind)]

    def run(self, seconds: float = 1000.0) -> None:
        self.virtual.run(self.virtual.time() + seconds)


@pytest.mark.parametrize("roles", [PAIR, UNIFIED])
def test_a_job_is_heard_of_until_it_has_finished(roles: tuple[Role, ...]) -> None:
    fleet = Heard(*roles)
    fleet.ask(online("a", max_tokens=100), answer_tokens=40)
    fleet.run()
    kinds = [type(event) for _, event in fleet.events]
    assert kinds[-1] is Finished
    assert (PrefillDone in kinds) is (roles == PAIR)
    assert fleet.of(Finished) == [Finished("a", 40)]
    assert left_over(fleet) == {}


def test_the_answer_ends_where_the_job_says_at_the_latest() -> None:
    fleet = Heard(*UNIFIED)
    fleet.ask(online("a", max_tokens=10), answer_tokens=40)
    fleet.run()
    assert fleet.of(Finished) == [Finished("a", 10)]


def test_no_policy_sees_how_long_an_answer_is() -> None:
    short, long = Heard(*PAIR), Heard(*PAIR)
    short.ask(online("a"), answer_tokens=2)
    long.ask(online("a"), answer_tokens=99)
    short.run()
    long.run()
    assert short.trace[0] == long.trace[0]


def test_the_way_to_the_server_and_back_takes_its_time() -> None:
    fleet = Heard(*UNIFIED)
    fleet.ask(online("a", 1000))
    fleet.run()
    ((told_us, _),) = [it for it in fleet.events if isinstance(it[1], FirstToken)]
    computed_s = fleet.backend.engines["unified0"].times.prefill_s([(1000, 0)])
    assert told_us / 1e6 == pytest.approx(computed_s + 0.001, rel=0.3)


def test_progress_is_told_once_a_tick_for_all() -> None:
    fleet = Heard(*UNIFIED)
    for name in "abc":
        fleet.ask(online(name, max_tokens=60), answer_tokens=60)
    fleet.run()
    last = fleet.of(Progress)[-1]
    assert {job_id for job_id, _ in last.tokens} == {"a", "b", "c"}
    assert len(fleet.of(Progress)) < 10


@pytest.mark.parametrize("after_s", [0.0002, 0.02, 0.3])
def test_a_job_whose_client_leaves_is_freed_at_once_and_gone_from_the_servers(
    after_s: float,
) -> None:
    fleet = Heard(*PAIR)
    fleet.ask(online("a", 2000, max_tokens=200), answer_tokens=200)
    fleet.at(after_s, fleet.driver.post, Left("a"))
    fleet.run()
    assert len(fleet.of(Freed)) == 1
    assert not fleet.of(Finished)
    assert left_over(fleet) == {}


def test_a_server_that_dies_fails_its_jobs_and_they_go_on_elsewhere() -> None:
    fleet = Heard(Role.UNIFIED, Role.UNIFIED)
    fleet.ask(online("a", max_tokens=60), answer_tokens=60)
    fleet.at(0.3, fleet.backend.engines["unified0"].kill)
    fleet.run()
    (failed,) = fleet.of(Failed)
    assert (failed.fault, failed.blamed) == ("died", ("unified0",))
    assert fleet.of(Finished) == [Finished("a", 60 - failed.generated)]
    assert failed.generated > 10


def test_a_dead_prefill_server_is_blamed() -> None:
    fleet = Heard(*PAIR)
    fleet.ask(online("a", 2000))
    fleet.at(0.01, fleet.backend.engines["prefill0"].kill)
    fleet.run(5)
    assert fleet.of(Failed)[0].blamed == ("prefill0",)


def test_a_prompt_that_the_server_will_not_have_is_a_bad_request() -> None:
    fleet = Heard(*UNIFIED, kv_tokens=200_000)
    fleet.ask(online("a", 140_000))
    fleet.run()
    assert fleet.of(Failed)[0].fault == "bad_request"
    assert isinstance(fleet.trace[-1][1], Fail)


@pytest.mark.parametrize("after_s", [0.0002, 0.02, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("roles", [PAIR, UNIFIED])
def test_a_preempted_job_makes_as_many_tokens_as_it_would_have(
    roles: tuple[Role, ...], after_s: float
) -> None:
    fleet = Heard(*roles)
    fleet.ask(offline("a", 2000, max_tokens=200), answer_tokens=150)
    fleet.at(after_s, fleet.driver.post, Recall("a"))
    fleet.run()
    (preempted,) = fleet.of(Preempted)
    assert fleet.of(Finished) == [Finished("a", 150 - preempted.generated)]
    assert (left_over(fleet), preempted.lost) == ({}, 0)


@pytest.mark.parametrize("resume", [Resume.RESTART, Resume.UNTIL_SHOWN])
def test_a_job_that_can_not_go_on_is_made_again_or_left_alone(resume: Resume) -> None:
    fleet = Heard(*UNIFIED)
    fleet.ask(offline("a", max_tokens=200, resume=resume), answer_tokens=150)
    fleet.at(0.3, fleet.driver.post, Recall("a"))
    fleet.run()
    told = fleet.of(Preempted)
    assert fleet.of(Finished) == [Finished("a", 150)]
    assert [it.lost > 5 for it in told] == ([True] if resume is Resume.RESTART else [])


def test_an_answer_that_is_on_its_way_is_not_preempted() -> None:
    fleet = Heard(*UNIFIED)
    fleet.ask(offline("a", max_tokens=60), answer_tokens=40)
    fleet.run()
    ((end_us, _),) = [it for it in fleet.events if isinstance(it[1], Finished)]
    again = Heard(*UNIFIED)
    again.ask(offline("a", max_tokens=60), answer_tokens=40)
    again.at(end_us / 1e6 - 0.0002, again.driver.post, Recall("a"))
    again.run()
    assert (again.of(Preempted), again.of(Finished)) == ([], [Finished("a", 40)])
    assert left_over(again) == {}


def test_a_preempted_job_gives_its_place_to_the_one_that_waits() -> None:
    fleet = Heard(*PAIR)
    for name in ("a", "b"):
        fleet.ask(offline(name, 4000, max_tokens=900), answer_tokens=300)
    fleet.ask(online("c", 4000, 1_000_000), answer_tokens=5)
    fleet.at(1.1, fleet.driver.post, Recall("a"))
    fleet.run()
    assert next(it.job_id for it in fleet.of(Finished)) == "c"
    assert left_over(fleet) == {}


def test_a_backlog_of_offline_work_is_done_in_the_end() -> None:
    fleet = Heard(*PAIR)
    for i in range(60):
        fleet.ask(offline(f"j{i:02}", 900), answer_tokens=20)
    fleet.run()
    assert len(fleet.of(Finished)) == 60
    assert left_over(fleet) == {}


def test_a_job_opened_and_refused_leaves_nothing() -> None:
    fleet = Heard(Role.PREFILL)
    fleet.ask(online("a"))
    fleet.run()
    assert left_over(fleet) == {}


def test_a_worker_is_what_a_probe_would_find() -> None:
    fleet = Heard(*PAIR)
    worker = worker_of(fleet.backend.engines["prefill0"])
    assert (worker.role, worker.bootstrap_port, worker.kv_tokens) == (Role.PREFILL, 9000, 8000)


def test_the_grid_keeps_the_order_in_which_things_were_asked_for() -> None:
    clock = VirtualClock()
    grid, said = Grid(clock), list[str]()
    grid.call_at(0.3, said.append, "first")
    grid.call_at(0.1 + 0.2, said.append, "second")
    grid.call_at(0.3, said.append, "never").cancel()
    clock.run()
    assert (said, grid.time()) == (["first", "second"], 0.3)


def test_an_event_before_anyone_listens_is_an_error() -> None:
    fleet = Heard(*UNIFIED)
    backend = type(fleet.backend)(fleet.backend.engines.values(), fleet.clock)
    backend.open("a", Work(prompt=named_prompt(("a", 5)), answer_tokens=1))
    backend.start(Dispatch(online("a", 5), None, "unified0", 1, Reason.LEAST_WORK))
    with pytest.raises(RuntimeError, match="before anyone listens"):
        fleet.run()
