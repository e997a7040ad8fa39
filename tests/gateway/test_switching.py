from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.actuators.simulated import SimulatedActuator
from gateway.core import Rules
from gateway.driver import Driver
from gateway.switching import SwitchRule
from policies.clock import VirtualClock
from policies.events import (
    Finished,
    FirstToken,
    Outcome,
    Preempted,
    RoleSwitched,
    SwitchOver,
    SwitchWanted,
    Wakeup,
    WorkerDown,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from policies.order import Fcfs
from policies.types import Role
from tests.gateway.talk import SECOND, Talk, decode, offline, online, pair, prefill, unified
from tests.simulated_fleet import RULES, Fleet, left_over, traffic

TO_PREFILL = SwitchWanted("d1", Role.PREFILL, "short_of_prefill")
TWO_DECODES = [prefill(), decode("d1"), decode("d2")]


def talk_with_a_move(hand_over_s: float = 5.0) -> Talk:
    """d1 decodes an online and an offline job, and is wanted as a prefill server."""
    rule = SwitchRule(hand_over_us=round(hand_over_s * SECOND))
    talk = Talk([prefill(), decode("d1")], Rules(order=Fcfs(), switch=rule))
    talk.arrive(online("on"), offline("off"))
    talk.say(FirstToken("on"), FirstToken("off"), WorkerUp(decode("d2")))
    return talk


# The core.


def test_an_empty_server_switches_at_once_and_is_back_as_what_it_says() -> None:
    talk = Talk(TWO_DECODES)
    assert talk.say(TO_PREFILL) == [("switch", "d1", "prefill")]
    assert talk.arrive(online("a")) == [("go", "a", "p", "d2")]
    assert talk.say(RoleSwitched("d1", Role.PREFILL)) == [("over", "d1", "done")]
    assert talk.arrive(online("b")) == [("go", "b", "d1", "d2")]


def test_offline_work_gives_way_and_online_work_may_end() -> None:
    talk = talk_with_a_move()
    assert talk.say(TO_PREFILL) == [("preempt", "off", "role_switch")]
    assert talk.say(Preempted("off", 3)) == [("go", "off", "p", "d2", "resume")]
    assert talk.say(Finished("on", 5)) == [("switch", "d1", "prefill")]


def test_online_work_that_takes_too_long_goes_on_elsewhere() -> None:
    talk = talk_with_a_move(hand_over_s=5)
    talk.say(TO_PREFILL)
    talk.say(Preempted("off"))
    assert talk.say(Wakeup(), at_us=4 * SECOND) == []
    assert talk.say(Wakeup(), at_us=5 * SECOND) == [("preempt", "on", "role_switch")]
    assert ("switch", "d1", "prefill") in talk.say(Preempted("on", 9))


def test_offline_work_may_be_waited_for_like_online_work() -> None:
    rule = SwitchRule(hand_over_offline_us=3 * SECOND)
    talk = Talk([prefill(), decode("d1")], Rules(order=Fcfs(), switch=rule))
    talk.arrive(offline("off"))
    talk.say(FirstToken("off"), WorkerUp(decode("d2")))
    assert talk.say(TO_PREFILL) == []
    assert talk.say(Wakeup(), at_us=2 * SECOND) == []
    assert talk.say(Wakeup(), at_us=3 * SECOND) == [("preempt", "off", "role_switch")]


def test_a_server_that_answers_while_it_switches_gets_nothing() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL, WorkerUp(decode("d1")))
    talk.say(WorkerUp(decode("d1")))
    assert talk.arrive(online("a")) == [("go", "a", "p", "d2")]


def test_a_server_that_somebody_else_has_switched_is_what_it_says() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    foreign = RoleSwitched("d1", Role.PREFILL, "somebody else did it", by_another=True)
    assert talk.say(foreign) == [("over", "d1", "switched_by_another")]
    assert talk.arrive(online("b")) == [("go", "b", "d1", "d2")]


@pytest.mark.parametrize(
    ("workers", "outcome"),
    [
        ([prefill(), decode("d1")], "last_of_its_role"),
        ([prefill(), decode("d1", model="a"), decode("d2", model="b")], "last_of_its_role"),
        ([prefill(), unified("d1"), unified("d2")], "unified"),
        ([prefill("d1"), prefill("p2"), decode()], "has_that_role"),
        (pair(), "not_there"),
    ],
)
def test_what_cannot_be_switched_stays(workers: list, outcome: str) -> None:  # type: ignore[type-arg]
    talk = Talk(workers)
    said = talk.say(TO_PREFILL)
    assert said == (
        [("switch", "d1", "prefill")] if outcome == "done" else [("over", "d1", outcome)]
    )


def test_two_servers_of_a_role_never_leave_at_once() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    assert talk.say(SwitchWanted("d2", Role.PREFILL, "")) == [("over", "d2", "last_of_its_role")]
    assert talk.say(TO_PREFILL) == [("over", "d1", "moves_already")]


def test_when_the_others_fail_meanwhile_the_one_that_drains_comes_back() -> None:
    talk = talk_with_a_move()
    talk.say(TO_PREFILL)
    assert ("over", "d1", "last_of_its_role") in talk.say(WorkerDown("d2"))
    assert talk.say(Preempted("off")) == [("go", "off", "p", "d1", "requeued")]


def test_a_server_that_does_not_get_empty_stays_what_it_is() -> None:
    talk = talk_with_a_move()
    talk.say(TO_PREFILL)
    said = talk.say(Wakeup(), at_us=121 * SECOND)
    assert ("over", "d1", "not_empty_in_time") in said
    assert talk.core.ledgers["d1"].usable(talk.now_us)


def test_a_server_that_came_back_in_its_old_role_serves_on() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    assert talk.say(RoleSwitched("d1", Role.DECODE, "refused")) == [("over", "d1", "failed")]
    assert talk.core.ledgers["d1"].usable(0)
    assert talk.core.ledgers["d1"].worker.role is Role.DECODE


def test_a_switch_that_hangs_is_told_of_once_and_may_still_end() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    assert talk.say(Wakeup(), at_us=121 * SECOND) == [("over", "d1", "hangs")]
    assert talk.say(Wakeup(), at_us=300 * SECOND) == []
    assert talk.arrive(online("a"), at_us=301 * SECOND) == [("go", "a", "p", "d2")]
    assert talk.say(RoleSwitched("d1", Role.PREFILL)) == [("over", "d1", "done")]


def test_a_server_that_does_not_answer_after_its_switch_gets_nothing() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    assert talk.say(RoleSwitched("d1", None, "timeout")) == [("over", "d1", "does_not_answer")]
    assert not talk.core.ledgers["d1"].usable(0)


def test_a_server_that_did_not_answer_is_back_once_it_does() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    talk.say(RoleSwitched("d1", None, "timeout"))
    talk.say(WorkerDown("d1"))
    talk.say(WorkerUp(prefill("d1")))
    assert talk.core.ledgers["d1"].usable(0)


def test_nobody_is_sent_to_a_server_before_its_switch_is_over() -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    for news in (WorkerUp(prefill("d1")), WorkerDraining("d1", draining=False)):
        talk.say(news)
        assert not talk.core.ledgers["d1"].usable(0)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE], ids=["switched", "refused"])
def test_an_operators_drain_outlasts_a_switch(role: Role) -> None:
    talk = Talk(TWO_DECODES)
    talk.say(TO_PREFILL)
    talk.say(WorkerDraining("d1"))
    talk.say(RoleSwitched("d1", role))
    assert not talk.core.ledgers["d1"].usable(0)
    talk.say(WorkerDraining("d1", draining=False))
    assert talk.core.ledgers["d1"].usable(0)


def test_a_server_that_is_taken_off_the_list_ends_its_move() -> None:
    talk = talk_with_a_move()
    talk.say(TO_PREFILL)
    assert ("over", "d1", "taken_off_the_list") in talk.say(WorkerGone("d1"))


def test_a_missed_probe_does_not_end_the_draining() -> None:
    talk = talk_with_a_move()
    talk.say(TO_PREFILL)
    talk.say(WorkerUp(decode("d1")))
    assert talk.arrive(online("b")) == [("go", "b", "p", "d2")]


def test_a_server_may_leave_for_good() -> None:
    talk = Talk(TWO_DECODES)
    assert talk.say(SwitchWanted("d1", None, "spare")) == [("release", "d1")]


def test_the_times_of_a_switch_are_told() -> None:
    talk = talk_with_a_move()
    talk.say(TO_PREFILL)
    talk.say(Preempted("off"), at_us=SECOND)
    talk.say(Finished("on", 1), at_us=2 * SECOND)
    [over] = talk.core.handle([RoleSwitched("d1", Role.PREFILL)], 3 * SECOND)
    assert isinstance(over, SwitchOver)
    assert (over.drained_us, over.took_us) == (2 * SECOND, 3 * SECOND)


def test_without_anybody_to_do_it_a_switch_fails_and_the_server_serves_on() -> None:
    clock = VirtualClock()
    fleet = Fleet(clock)
    fleet.driver.post(SwitchWanted("decode1", Role.PREFILL, ""))
    clock.run(1.0)
    told = [it for _, it in fleet.trace if isinstance(it, SwitchOver)]
    assert [it.outcome for it in told] == [Outcome.FAILED]


# With engines.

ROLES = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE)


def moving_fleet(seed: int) -> tuple[VirtualClock, Fleet]:
    clock = VirtualClock()
    fleet = Fleet(clock, roles=ROLES, rules=RULES, seed=seed)
    engines = fleet.backend.engines.values()
    actuator = SimulatedActuator(engines, fleet.clock, fleet.worker, launch_s=0.5)
    fleet.driver = Driver(fleet.core, fleet.clock, fleet.backend, fleet._observe, actuator=actuator)
    return clock, fleet


def roles(fleet: Fleet) -> Iterator[Role]:
    return (ledger.worker.role for ledger in fleet.core.ledgers.values())


names = st.sampled_from([f"{role}{i}" for i, role in enumerate(ROLES)])
wanted_roles = st.sampled_from([Role.PREFILL, Role.DECODE])
wishes = st.lists(st.tuples(st.floats(0.0, 4.0), names, wanted_roles), max_size=8)


@settings(max_examples=25)
@given(st.integers(0, 10**6), wishes)
def test_whatever_is_switched_and_when_nothing_is_lost_and_no_role_is_without_a_server(
    seed: int, wished: list[tuple[float, str, Role]]
) -> None:
    clock, fleet = moving_fleet(seed)
    jobs = traffic(seed, 80)
    for job, answer in jobs:
        fleet.ask(job, answer)
    for at_s, name, role in wished:
        fleet.at(at_s, fleet.driver.post, SwitchWanted(name, role, "wished"))
    fleet.poll()
    clock.run(300.0)
    assert left_over(fleet) == {}
    assert {Role.PREFILL, Role.DECODE} <= set(roles(fleet))
    assert all(ledger.usable(10**12) for ledger in fleet.core.ledgers.values())
    kinds = {type(it).__name__ for _, it in fleet.trace}
    assert "Fail" not in kinds
    assert "Reject" not in kinds


def test_a_busy_decode_server_becomes_a_prefill_server_and_computes_prompts() -> None:
    clock, fleet = moving_fleet(1)
    for job, answer in traffic(1, 150):
        fleet.ask(job, answer)
    fleet.at(0.3, fleet.driver.post, SwitchWanted("decode3", Role.PREFILL, "wished"))
    fleet.poll()
    clock.run(300.0)
    assert fleet.backend.engines["decode3"].role is Role.PREFILL
    assert fleet.core.ledgers["decode3"].dispatched > 0
    done = [it for _, it in fleet.trace if isinstance(it, SwitchOver)]
    assert [it.outcome for it in done] == [Outcome.DONE]


def test_a_server_that_left_costs_nothing_more_and_may_come_back_in_another_role() -> None:
    clock = VirtualClock()
    fleet = Fleet(clock, roles=ROLES)
    engines = fleet.backend.engines.values()
    actuator = SimulatedActuator(engines, fleet.clock, fleet.worker, launch_s=2.0)
    driver = Driver(fleet.core, fleet.clock, fleet.backend, actuator=actuator)
    driver.post(SwitchWanted("decode4", None, "spare"))
    clock.run(10.0)
    assert "decode4" not in fleet.core.ledgers
    assert actuator.gpu_s(10.0) == pytest.approx(40.0)
    assert actuator.launch(Role.PREFILL)
    assert actuator.starting == {Role.PREFILL: 1}
    clock.run(20.0)
    assert fleet.core.ledgers["decode4"].worker.role is Role.PREFILL
    assert actuator.gpu_s(20.0) == pytest.approx(90.0)
    assert not actuator.launch(Role.DECODE)
