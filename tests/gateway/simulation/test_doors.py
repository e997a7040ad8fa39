from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from gateway.config import Policies
from gateway.scenario import PolicyEntry, ServerEntry, WorkloadEntry
from gateway.simulation.budget import BudgetEntry, LatencyBudget
from gateway.simulation.doors import DOORS, Aimd, Open, PriorityClasses
from gateway.simulation.plan import Plan
from gateway.simulation.records import Ended
from policies.types import Job, Kind, Role
from tests.gateway.simulation.scenarios import plan, ran


class Hall:
    """Nothing but counters, and a clock that the test moves."""

    def __init__(self, slots: int = 10) -> None:
        self.slots = slots
        self.online_waiting = 0
        self.kv_use = 0.0
        self.decoding_servers = 1
        self.context_tokens = 0
        self.now_s = 0.0
        self.budget = BudgetEntry()
        self.entered: list[str] = []
        self.turned_out: list[str] = []
        self.later: list[tuple[float, Callable[..., object], tuple[object, ...]]] = []

    def enter(self, job: Job) -> None:
        self.entered.append(job.id)

    def turn_out(self, job: Job, again_s: float) -> None:
        self.turned_out.append(job.id)

    def call_in(self, seconds: float, callback: Callable[..., object], *given: object) -> None:
        self.later.append((seconds, callback, given))

    def pass_time(self) -> None:
        later, self.later = self.later, []
        for _, callback, given in later:
            callback(*given)


def job(name: str, kind: Kind = Kind.OFFLINE) -> Job:
    return Job(name, kind, "", 100, 100, 0, 1, 1)


def classes(hall: Hall) -> PriorityClasses:
    """Of ten slots two are kept from offline requests while no online one is there."""
    return PriorityClasses(
        hall, reserved_floor=2, reserved_share=0.0, above_reserved=0, between_share=0.0
    )


def fill(door: PriorityClasses, count: int) -> None:
    for k in range(count):
        door.arrived(job(f"b{k}"))


def test_an_open_door_holds_nobody_back() -> None:
    hall = Hall()
    Open(hall).arrived(job("b"))
    assert hall.entered == ["b"]


def test_slots_kept_for_online_requests_are_not_given_to_offline_ones() -> None:
    hall = Hall()
    door = classes(hall)
    fill(door, 12)
    assert len(hall.entered) == 8
    door.arrived(job("a", Kind.ONLINE))
    assert hall.entered[-1] == "a"
    door.ended("b0")
    assert hall.entered[-1] == "b8"


def test_an_online_request_without_a_slot_turns_out_the_newest_silent_offline_one() -> None:
    hall = Hall()
    door = classes(hall)
    fill(door, 8)
    for k in range(7):
        door.first_token(f"b{k}")
    for k in range(4):
        door.arrived(job(f"a{k}", Kind.ONLINE))
    assert hall.turned_out == ["b7"]
    assert hall.entered[-3:] == ["a0", "a1", "a2"]
    door.ended("b0")
    assert hall.entered[-1] == "a3"


def test_a_full_queue_sends_the_client_away_for_a_second() -> None:
    hall = Hall(slots=2)
    door = classes(hall)
    door.queue_size = {Kind.ONLINE: 1, Kind.OFFLINE: 1}
    fill(door, 2)
    assert [seconds for seconds, _, _ in hall.later] == [1.0]
    door.queue_size[Kind.OFFLINE] = 2
    hall.pass_time()
    assert [it.id for it in door.queues[Kind.OFFLINE]] == ["b0", "b1"]


def test_the_window_grows_by_one_and_halves_when_online_requests_wait() -> None:
    hall = Hall()
    door = Aimd(hall, window=4)
    for k in range(20):
        door.arrived(job(f"b{k}"))
    assert len(hall.entered) == 4
    hall.pass_time()
    assert len(hall.entered) == 5
    hall.online_waiting = 1
    hall.pass_time()
    assert door.window == 2


def test_the_window_stays_between_its_two_marks_and_halves_above() -> None:
    hall = Hall()
    door = Aimd(hall, window=4)
    for k in range(20):
        door.arrived(job(f"b{k}"))
    hall.kv_use = 0.75
    hall.pass_time()
    assert door.window == 4
    hall.kv_use = 0.85
    hall.pass_time()
    assert door.window == 2


def test_a_window_that_is_not_full_does_not_grow() -> None:
    hall = Hall()
    door = Aimd(hall, window=4)
    door.arrived(job("b"))
    hall.pass_time()
    assert door.window == 4
    door.ended("b")
    hall.pass_time()
    assert not hall.later


def test_online_requests_pass_the_window_by() -> None:
    hall = Hall()
    door = Aimd(hall, window=1)
    for k in range(5):
        door.arrived(job(f"a{k}", Kind.ONLINE))
    assert len(hall.entered) == 5


def budgeted(**more: float) -> tuple[Hall, LatencyBudget]:
    """Steps of 10 ms and one more for each request; prompts of 100 tokens take 0.1 s."""
    hall = Hall()
    hall.budget = BudgetEntry(
        **{"ms": 14.5, "step_ms": 10.0, "sequence_us": 1000.0, "context_token_us": 0.0,
           "prompt_token_us": 0.0} | more
    )  # fmt: skip
    return hall, LatencyBudget(hall)


def test_a_budget_counts_everybody_and_holds_back_offline_requests_only() -> None:
    hall, door = budgeted()
    for k in range(3):
        door.arrived(job(f"b{k}"))
    for k in range(3):
        door.arrived(job(f"a{k}", Kind.ONLINE))
    door.arrived(job("b3"))
    assert hall.entered == ["b0", "b1", "b2", "a0", "a1", "a2"]
    for name in ("b0", "a0"):
        door.ended(name)
    hall.pass_time()
    assert "b3" not in hall.entered
    door.ended("b1")
    hall.pass_time()
    assert hall.entered[-1] == "b3"


def test_a_prompt_on_a_unified_server_is_paid_for_before_the_next_enters() -> None:
    """One inside makes steps of 11 ms: of a budget of 24 ms 54 % are left to pay with."""
    hall, door = budgeted(ms=24.0, prompt_token_us=1000.0)
    door.arrived(job("a", Kind.ONLINE))
    door.arrived(job("b"))
    assert hall.entered == ["a"]
    for now_s, entered in ((0.17, ["a"]), (0.19, ["a", "b"])):
        hall.now_s = now_s
        hall.pass_time()
        assert hall.entered == entered


def test_prompts_are_no_debt_while_no_online_request_is_inside() -> None:
    hall, door = budgeted(ms=24.0, prompt_token_us=1000.0)
    for k in range(3):
        door.arrived(job(f"b{k}"))
    assert hall.entered == ["b0", "b1", "b2"]


def crowd(policy: PolicyEntry, *, slots: int = 256) -> Plan:
    servers = (
        ServerEntry(role=Role.PREFILL, priority=True),
        ServerEntry(role=Role.DECODE, max_running=slots, priority=True),
    )
    chat = WorkloadEntry(name="chat", rate=4.0, output_median=30.0, ttft_ms=1000.0)
    batch = WorkloadEntry(name="batch", kind=Kind.OFFLINE, arrivals="backlog", count=60)
    return plan(chat, batch, servers=servers, policy=(policy,), duration_s=20.0)


FIRST_COME = Policies(order="fcfs", pools="none")


def test_everybody_is_served_through_every_door() -> None:
    for door in DOORS:
        policy = PolicyEntry(name=door, policies=FIRST_COME, door=door)
        records = ran(crowd(policy, slots=240)).records
        assert {it.ended for it in records} == {Ended.FINISHED}


def test_who_is_turned_out_is_served_later_and_what_it_cost_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With six slots for all and none reserved, online requests displace what has not begun."""
    narrow = partial(
        PriorityClasses, reserved_floor=0, reserved_share=0.0, above_reserved=0, between_share=0.0
    )
    monkeypatch.setitem(DOORS, "priority-classes", narrow)
    policy = PolicyEntry(name="classes", policies=FIRST_COME, door="priority-classes")
    records = ran(crowd(policy, slots=6)).records
    assert {it.ended for it in records} == {Ended.FINISHED}
    assert sum(it.attempts for it in records) == len(records)
    assert sum(it.wasted_tokens for it in records) > 0


def test_a_gateway_that_is_told_no_classes_makes_online_requests_wait_behind_a_backlog() -> None:
    told = PolicyEntry(name="told", policies=FIRST_COME)
    blind = PolicyEntry(name="blind", policies=FIRST_COME, tells_classes=False)
    waits = []
    for policy in (told, blind):
        records = ran(crowd(policy)).records
        waits.append(max(it.ttft_us or 0 for it in records if it.kind is Kind.ONLINE))
    assert waits[1] > 2 * waits[0]


@pytest.mark.parametrize("door", ["priority-classes", "aimd"])
def test_a_door_sees_the_servers_that_are_there(door: str) -> None:
    late = ServerEntry(name="late", kv_tokens=50_000, joins_s=2.0, start_up_s=3.0)
    policy = PolicyEntry(name=door, policies=FIRST_COME, door=door)
    crowded = crowd(policy, slots=240)
    [one] = crowded.scenario.fleet
    grown = replace(one, server=(*one.server, late))
    records = ran(replace(crowded, scenario=replace(crowded.scenario, fleet=(grown,)))).records
    assert {it.ended for it in records} == {Ended.FINISHED}
