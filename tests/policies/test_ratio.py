from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.capacity import (
    decode_rate,
    largest_decode_batch,
    late_share,
    prefill_rate,
    prefill_s,
    waits_share,
)
from policies.demand import Demand, Fleet, Flow, Lengths, Targets
from policies.dopd_plus import DopdPlus
from policies.need import Reckoning, least
from policies.planners import Dopd, DynLoad, DynSla
from policies.ratio import Memory, Plan, Ratio, Static, Why
from tests.policies.sites import CHAT, CODE, COST, REASONING, SITE, TARGETS, demand, fleet, flow

POLICIES: list[Ratio] = [Static(), Dopd(), DopdPlus(), DynLoad(), DynSla()]
S = 1_000_000

some_length = st.one_of(st.just(0.0), st.floats(1.0, 30_000.0))
"""A mean of whole numbers, or that of none."""
lengths = st.builds(Lengths, some_length, st.floats(0.0, 1e9))
flows = st.builds(
    Flow,
    rate_per_s=st.floats(0.0, 2000.0),
    burstiness=st.floats(0.25, 50.0),
    prompt=lengths,
    answer=lengths,
    cached_share=st.floats(0.0, 1.0),
)
demands = st.builds(
    Demand,
    online=flows,
    expected=flows,
    offline=flows,
    targets=st.just(TARGETS),
    waiting=st.integers(0, 10_000),
    waiting_tokens=st.integers(0, 10**8),
    oldest_wait_s=st.floats(0.0, 1e4),
    kv_use=st.floats(0.0, 1.0),
    ttft_s=st.one_of(st.none(), st.floats(1e-3, 1e3)),
    tpot_s=st.one_of(st.none(), st.floats(1e-4, 10.0)),
    stay_s=st.one_of(st.none(), st.floats(1e-3, 1e4)),
    idle_s=st.floats(0.0, 1e5),
)
budgets = st.one_of(st.just(0), st.integers(8, 64))


def asked(policy: Ratio, demanded: Demand, of: Fleet, memory: Memory | None = None) -> Plan:
    return policy.next(memory or Memory(), demanded, of, 0)[1]


def split(plan: Plan) -> tuple[int, int]:
    return plan.prefills, plan.decodes


# What holds for all of them.


@given(st.sampled_from(POLICIES), demands, st.integers(1, 4), st.integers(1, 4), budgets)
def test_no_role_is_ever_left_without_a_server(
    policy: Ratio, demanded: Demand, prefills: int, decodes: int, budget: int
) -> None:
    plan = asked(policy, demanded, fleet(prefills, decodes, budget))
    assert plan.prefills >= 1
    assert plan.decodes >= 1


@given(st.sampled_from(POLICIES), demands, st.integers(1, 4), st.integers(1, 4), budgets)
def test_no_plan_is_larger_than_the_budget(
    policy: Ratio, demanded: Demand, prefills: int, decodes: int, budget: int
) -> None:
    plan = asked(policy, demanded, fleet(prefills, decodes, budget))
    total = plan.prefills + plan.decodes
    assert total <= budget if budget else total == prefills + decodes


@given(st.sampled_from(POLICIES), demands, budgets)
def test_the_same_look_gives_the_same_plan(policy: Ratio, demanded: Demand, budget: int) -> None:
    of = fleet(2, 2, budget)
    assert policy.next(Memory(), demanded, of, 5) == policy.next(Memory(), demanded, of, 5)


# Capacity.


def test_erlang_c_has_its_known_values() -> None:
    assert waits_share(1, 0.5) == pytest.approx(0.5)
    assert waits_share(2, 1.0) == pytest.approx(1 / 3)
    assert waits_share(3, 3.0) == 1.0


def test_with_one_server_and_random_times_the_late_share_is_that_of_m_m_1() -> None:
    assert late_share(1, 0.5, 1.0, 2.0, 1.0) == pytest.approx(0.5 * math.exp(-1.0))


@given(flows.filter(lambda f: f.prompt.mean > 1 and f.answer.mean > 1), st.integers(1, 20))
def test_more_servers_never_bear_less(some: Flow, servers: int) -> None:
    for rate in (prefill_rate, decode_rate):
        assert rate(servers + 1, SITE, some, TARGETS) >= rate(servers, SITE, some, TARGETS)


def test_a_prompt_costs_what_the_cost_model_says_and_more_where_lengths_differ() -> None:
    even = replace(CHAT, prompt=Lengths(1155.0, 0.0))
    assert prefill_s(SITE, even) == pytest.approx(COST.prefill_one(1155).seconds, rel=1e-3)
    assert prefill_s(SITE, CHAT) > prefill_s(SITE, even)


def test_cached_prompts_cost_less() -> None:
    assert prefill_s(SITE, replace(CHAT, cached_share=0.8)) < 0.5 * prefill_s(SITE, CHAT)


def test_bursts_leave_less_of_a_prefill_server() -> None:
    calm, bursty = flow(CHAT, 1.0), flow(CHAT, 1.0, burstiness=30.0)
    rates = [prefill_rate(2, SITE, it, TARGETS) for it in (calm, bursty)]
    assert rates[1] < 0.8 * rates[0]


def test_a_larger_batch_than_planned_would_miss_the_target_or_the_memory() -> None:
    for some in (CHAT, CODE, REASONING):
        count = largest_decode_batch(SITE, some, TARGETS)
        context = some.prompt.mean + some.answer.squared / (2 * some.answer.mean)
        assert COST.decode(count, round(count * context)).seconds <= TARGETS.tpot_s
        more = count + 1
        late = COST.decode(more, round(more * context)).seconds > TARGETS.tpot_s
        assert late or more * context > 0.9 * SITE.kv_tokens or more > SITE.max_running


@given(st.integers(1, 300))
def test_the_least_that_bears_is_found(wanted: int) -> None:
    assert least(lambda count: count >= wanted, 200) == min(wanted, 201)


# dopd, as printed.


def test_dopd_gives_the_worked_example() -> None:
    """ISL 1024, OSL 245: nine blocks of 128, B_max 226."""
    asked_for = demand(replace(CHAT, prompt=Lengths(1024.0), answer=Lengths(245.0)), 30.0)
    plan = asked(Dopd(), asked_for, fleet(1, 1, budget=16))
    step_s = COST.decode(226, round(226 * 1146.5)).seconds
    assert plan.terms["batch"] == 226
    ratio = 226 * COST.prefill_one(1024).seconds / (245 * step_s)
    assert plan.terms["ratio"] == pytest.approx(ratio)
    assert split(plan) == (math.ceil(ratio), math.ceil(300 / 226))


def test_dopd_scales_down_into_its_budget() -> None:
    plan = asked(Dopd(), demand(CODE, 30.0), fleet(1, 1, budget=5))
    assert split(plan) == (4, 1)


def test_dopd_goes_to_the_least_when_nobody_has_come_for_a_while() -> None:
    plan = asked(Dopd(), demand(CHAT, 0.0, idle_s=51.0), fleet(3, 3, budget=8))
    assert (split(plan), plan.why) == ((1, 1), Why.IDLE)


def test_dopd_skips_the_look_after_the_fleet_has_changed() -> None:
    memory, _ = Dopd().next(Memory(), demand(CODE, 30.0), fleet(1, 1, budget=8), 0)
    plan = asked(Dopd(), demand(CODE, 30.0), fleet(2, 1, budget=8), memory)
    assert (split(plan), plan.why) == ((2, 1), Why.CHANGED)


# dopd+.


def hour(
    like: Flow, rate: float, start: Fleet, seed: int, noise: float
) -> tuple[list[tuple[int, int]], Fleet]:
    """Every plan that changed the fleet in an hour of looks, after five minutes to settle."""
    random, memory, of, changes = Random(seed), Memory(), start, []
    for look in range(390):
        now = demand(like, rate * (1 + random.gauss(0.0, noise)))
        mean = now.online.answer.mean * (1 + random.gauss(0.0, noise / 2))
        answer = Lengths(mean, now.online.answer.variance)
        now = replace(now, online=replace(now.online, answer=answer))
        memory, plan = DopdPlus().next(memory, now, of, look * 10 * S)
        if split(plan) != (of.prefills, of.decodes):
            of = replace(of, prefills=plan.prefills, decodes=plan.decodes)
            if look >= 30:
                changes.append(split(plan))
    return changes, of


@settings(max_examples=12)
@given(
    st.sampled_from([CHAT, CODE, REASONING]),
    st.floats(0.5, 60.0),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 10**6),
)
def test_constant_load_with_noise_moves_a_fixed_fleet_at_most_once_an_hour(
    like: Flow, rate: float, prefills: int, decodes: int, seed: int
) -> None:
    changes, of = hour(like, rate, fleet(prefills, decodes), seed, noise=0.04)
    assert len(changes) <= 1
    assert of.prefills + of.decodes == prefills + decodes


@settings(max_examples=12)
@given(
    st.sampled_from([CHAT, CODE, REASONING]),
    st.floats(0.5, 60.0),
    st.integers(0, 10**6),
)
def test_constant_load_with_noise_changes_an_elastic_fleet_at_most_once_an_hour(
    like: Flow, rate: float, seed: int
) -> None:
    changes, _ = hour(like, rate, fleet(2, 2, budget=64), seed, noise=0.04)
    assert len(changes) <= 1


def test_what_is_missing_is_added_at_once() -> None:
    plan = asked(DopdPlus(), demand(CHAT, 80.0), fleet(1, 1, budget=16))
    assert plan.why is Why.SHORT_OF_BOTH
    assert split(plan) == (3, 2)


def test_the_plan_bears_the_load_and_one_server_less_would_not() -> None:
    for like, rate in ((CHAT, 80.0), (CODE, 80.0), (REASONING, 8.0)):
        asked_for = demand(like, rate)
        plan = asked(DopdPlus(ahead=0.0), asked_for, fleet(1, 1, budget=64))
        bears = (prefill_rate, plan.prefills), (decode_rate, plan.decodes)
        for rate_of, count in bears:
            assert rate_of(count, SITE, asked_for.online, TARGETS) >= rate
            assert count == 1 or rate_of(count - 1, SITE, asked_for.online, TARGETS) < rate


def test_a_role_that_can_spare_a_server_gives_it_to_the_one_that_is_short() -> None:
    plan = asked(DopdPlus(), demand(REASONING, 4.0), fleet(3, 1))
    assert (split(plan), plan.why) == ((1, 3), Why.SHORT_OF_DECODE)


def test_a_server_is_not_given_away_when_those_left_would_not_bear_their_load() -> None:
    """The load of each is N / (N - 1) of what it was."""
    asked_for = demand(CODE, 70.0)
    assert Reckoning(asked_for, fleet(4, 1)).need().prefills == 4  # type: ignore[union-attr]
    busy_decodes = replace(asked_for, kv_use=0.97)
    plan = asked(DopdPlus(), busy_decodes, fleet(4, 1))
    assert split(plan) == (4, 1)


def test_spare_servers_go_after_the_dwell_and_not_before() -> None:
    policy, memory, of = DopdPlus(dwell_s=60.0), Memory(), fleet(4, 4, budget=16)
    plans = []
    for look in range(8):
        memory, plan = policy.next(memory, demand(CHAT, 10.0), of, look * 10 * S)
        plans.append((split(plan), plan.why))
    assert plans[5] == ((4, 4), Why.DWELL)
    assert plans[6] == ((1, 1), Why.SPARE)


def test_a_busy_moment_within_the_dwell_begins_it_anew() -> None:
    policy, memory, of = DopdPlus(dwell_s=60.0), Memory(), fleet(2, 2, budget=16)
    whys = []
    for look in range(9):
        rate = 70.0 if look == 5 else 10.0
        memory, plan = policy.next(memory, demand(CHAT, rate), of, look * 10 * S)
        whys.append(plan.why)
    assert Why.SPARE not in whys


def test_while_servers_move_nobody_else_is_moved() -> None:
    for of in (fleet(1, 1, moving=1), fleet(3, 3, budget=16, moving=1)):
        for rate in (0.1, 5.0):
            plan = asked(DopdPlus(), demand(CHAT, rate), of)
            assert (split(plan), plan.why) == ((of.prefills, of.decodes), Why.MOVING)


def test_while_servers_move_what_is_missing_all_the_same_is_started_within_the_budget() -> None:
    plan = asked(DopdPlus(), demand(CHAT, 500.0), fleet(1, 1, budget=16, moving=1))
    assert plan.prefills > 1
    assert plan.prefills + plan.decodes == 16


def test_a_server_is_not_given_back_at_once_for_what_waited_while_it_switched() -> None:
    policy, memory = DopdPlus(dwell_s=60.0), Memory()
    memory, plan = policy.next(memory, demand(REASONING, 20.0), fleet(3, 3), 0)
    assert plan.decodes > 3
    behind = demand(CODE, 20.0, waiting=900, waiting_tokens=2_000_000)
    of = fleet(plan.prefills, plan.decodes)
    memory, held = policy.next(memory, behind, of, 6 * S)
    assert (split(held), held.why) == (split(plan), Why.DWELL)
    _, later = policy.next(memory, behind, of, 61 * S)
    assert later.prefills > plan.prefills


def test_decode_servers_are_not_added_for_bursts_shorter_than_an_answer() -> None:
    burst, of = demand(REASONING, 8.0), fleet(1, 1, budget=16)
    lasting = replace(burst, lasting_per_s=3.0)
    plans = [asked(DopdPlus(), it, of) for it in (burst, lasting)]
    assert plans[1].decodes < plans[0].decodes
    assert plans[1].prefills == plans[0].prefills


@pytest.mark.parametrize("planner", [DynLoad, DynSla])
def test_a_planner_with_headroom_wants_no_fewer_servers(
    planner: type[DynLoad] | type[DynSla],
) -> None:
    busy = demand(CHAT, 60.0, waiting=8, kv_use=0.7)
    plain, roomy = (
        asked(planner(headroom=times), busy, fleet(1, 1, budget=16)) for times in (1.0, 3.0)
    )
    assert roomy.prefills >= plain.prefills
    assert sum(split(roomy)) > sum(split(plain))


def test_a_backlog_asks_for_more_prefill_servers_until_it_is_gone() -> None:
    calm, of = demand(CHAT, 20.0), fleet(1, 2, budget=16)
    behind = demand(CHAT, 20.0, waiting=900, waiting_tokens=1_000_000)
    assert asked(DopdPlus(), calm, of).prefills == 1
    assert asked(DopdPlus(), behind, of).prefills > 1


def test_offline_work_counts_as_work_without_a_deadline() -> None:
    online = demand(CHAT, 10.0)
    both = replace(online, offline=flow(CODE, 40.0))
    assert asked(DopdPlus(), both, fleet(1, 1, budget=16)).prefills > 1


@pytest.mark.parametrize(
    ("others", "urgent"),
    [({}, False), ({"oldest_wait_s": 0.8}, True), ({"kv_use": 0.96}, True)],
)
def test_long_waits_and_full_memory_are_urgent(others: dict[str, float], urgent: bool) -> None:  # noqa: FBT001
    assert DopdPlus().is_urgent(demand(CHAT, 1.0, **others)) is urgent


def test_without_enough_for_both_the_fuller_role_is_relieved_if_that_is_worth_it() -> None:
    plan = asked(DopdPlus(), demand(REASONING, 20.0), fleet(3, 3))
    assert (split(plan), plan.why) == ((1, 5), Why.SHORT_OF_DECODE)
    assert plan.terms["pressure_after"] < plan.terms["pressure"]


@pytest.mark.parametrize("waits_for", ["prompts", "answers"])
def test_in_overload_the_best_split_stays_whichever_role_is_waited_for(waits_for: str) -> None:
    """What has come together while servers moved would move them again after each dwell."""
    queue = {"waiting": 1000, "waiting_tokens": round(1000 * CHAT.prompt.mean)}
    asked_for = demand(CHAT, 120.0, decode_is_full=waits_for == "answers", **queue)
    plan = asked(DopdPlus(), asked_for, fleet(3, 3))
    assert (split(plan), plan.why) == ((3, 3), Why.HOLDS)


def test_without_anything_known_the_fleet_stays() -> None:
    plan = asked(DopdPlus(), Demand(targets=Targets()), fleet(2, 3, budget=16))
    assert (split(plan), plan.why) == ((2, 3), Why.UNKNOWN)


# Dynamo's planners.


def test_dyn_load_moves_by_one_and_spares_a_new_decode_server() -> None:
    policy, of = DynLoad(), fleet(2, 2, budget=16)
    memory, up = policy.next(Memory(), demand(CHAT, 1.0, kv_use=0.95), of, 0)
    assert split(up) == (1, 3)
    spared = []
    for _ in range(3):
        memory, plan = policy.next(memory, demand(CHAT, 1.0, kv_use=0.1), fleet(1, 3, 16), 0)
        spared.append(plan.decodes)
    assert spared == [3, 3, 2]


def test_dyn_load_adds_prefill_only_while_the_queue_does_not_shrink() -> None:
    policy, of, memory = DynLoad(), fleet(1, 1, budget=16), Memory()
    found = []
    for waiting in (10, 20, 30, 12, 6):
        memory, plan = policy.next(memory, demand(CHAT, 1.0, waiting=waiting, kv_use=0.3), of, 0)
        found.append(plan.prefills)
    assert found == [2, 2, 2, 1, 1]


def test_dyn_sla_divides_the_load_by_the_throughput_of_the_profile() -> None:
    asked_for = demand(CHAT, 100.0)
    plan = asked(DynSla(), asked_for, fleet(1, 1, budget=32))
    prompts = 100.0 * 1155 / plan.terms["prefill_tokens_per_s_per_gpu"]
    answers = 100.0 * 211 / plan.terms["decode_tokens_per_s_per_gpu"]
    assert split(plan) == (math.ceil(prompts), math.ceil(answers))


def test_dyn_sla_plans_more_decode_servers_where_steps_are_slower_than_the_profile() -> None:
    quick = demand(CHAT, 100.0, tpot_s=0.008, stay_s=2.0)
    slow = demand(CHAT, 100.0, tpot_s=0.03, stay_s=2.0)
    plans = [asked(DynSla(), it, fleet(1, 2, budget=64)).decodes for it in (quick, slow)]
    assert plans[0] < plans[1]
