"""The laws of step packing: who is on time stays so, nobody starves, stock is never made worse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.packing import (
    PACKING,
    All,
    Everybody,
    Kairos,
    MostKept,
    OnlineFirst,
    OnlinePaced,
    Packing,
    Running,
    Slack,
    StepUs,
)
from policies.step_table import StepTable

TPOT_US = 50_000.0


def by_sum(count: int, context: int, longest: int) -> float:
    return 9_000.0 + 150.0 * count + 0.1 * context


def by_longest(count: int, context: int, longest: int) -> float:
    return 9_000.0 + 150.0 * count + 0.24 * longest


LAWS_OF_STEPS = [by_sum, by_longest]
KEPT = MostKept()
SLACKS: list[Slack | MostKept] = [Slack(), KEPT]
EVERY: list[Packing] = [All(), Kairos(), *SLACKS, OnlineFirst(), OnlinePaced()]

rows = st.builds(
    Running,
    context_tokens=st.integers(1, 131_072),
    produced=st.integers(0, 2_000),
    since_first_us=st.floats(0, 60_000_000),
    tpot_us=st.sampled_from([0.0, 20_000.0, TPOT_US]),
    skipped=st.integers(0, 20),
    is_online=st.booleans(),
    must_step=st.booleans(),
)
running = st.lists(rows, min_size=1, max_size=12)
step_laws = st.sampled_from(LAWS_OF_STEPS)


def row(tokens: int, *, slack_ms: float = 1000.0, skipped: int = 0, online: bool = True) -> Running:
    """On its second token, with so much time left for it."""
    return Running(tokens, 0, TPOT_US - slack_ms * 1e3, TPOT_US, skipped, online)


def took(members: Sequence[Running], chosen: Sequence[int], step_us: StepUs) -> float:
    tokens = [members[i].context_tokens for i in chosen]
    return step_us(len(tokens), sum(tokens), max(tokens))


@given(running, step_laws)
def test_a_packing_chooses_some_of_those_that_run_in_order_and_the_same_twice(
    members: list[Running], step_us: StepUs
) -> None:
    for name, packing in PACKING.items():
        chosen = packing.choose(members, step_us)
        assert chosen, name
        assert chosen == sorted(set(chosen) & set(range(len(members)))), name
        assert chosen == packing.choose(members, step_us), name


@given(running, step_laws)
def test_whoever_must_step_steps(members: list[Running], step_us: StepUs) -> None:
    must = {i for i, member in enumerate(members) if member.must_step}
    for packing in EVERY:
        assert must <= set(packing.choose(members, step_us)), packing


@given(running, step_laws)
def test_a_step_of_some_is_no_longer_than_those_on_time_can_bear(
    members: list[Running], step_us: StepUs
) -> None:
    chosen = Slack().choose(members, step_us)
    if 1 < len(chosen) < len(members) and not any(m.must_step for m in members):
        assert took(members, chosen, step_us) <= Slack().limit_us(members)


def test_where_too_few_fit_the_engine_steps_as_few_more_as_tokens_per_second_ask_for() -> None:
    """Each request costs less than a mean one: a step of one alone would halve the tokens."""
    short = [row(1_000)._replace(tpot_us=11_000.0, since_first_us=0.0)] * 6
    members = [*short, *([row(90_000, slack_ms=30_000)] * 2)]

    def step_us(count: int, context: int, longest: int) -> float:
        return 9_000.0 + 250.0 * count + 0.05 * context

    assert KEPT.kept(Everybody(members, step_us))[0] < step_us(4, 4_000, 1_000)
    assert Slack(aim=0.8).choose(members, step_us) == [*range(8)]
    assert KEPT.choose(members, step_us) == [*range(4)]


@pytest.mark.parametrize("slack", SLACKS)
@given(running, step_laws)
def test_nobody_is_left_out_where_a_step_of_all_keeps_to_the_limit_or_a_turn_has_come(
    slack: Slack, members: list[Running], step_us: StepUs
) -> None:
    """So packing is stock, unless stock makes somebody late."""
    chosen = slack.choose(members, step_us)
    if len(chosen) < len(members):
        all_us = took(members, range(len(members)), step_us)
        if isinstance(slack, MostKept):
            assert all_us > slack.kept(Everybody(members, step_us))[0]
        else:
            assert all_us > slack.limit_us(members)
            assert all(m.skipped < slack.most_skipped for m in members)
        waited = {i for i, m in enumerate(members) if m.skipped >= slack.most_skipped}
        assert waited <= set(chosen)


@pytest.mark.parametrize("slack", SLACKS)
@given(running, step_laws)
def test_packing_costs_no_tokens_per_second_but_for_what_may_be_spent(
    slack: Slack, members: list[Running], step_us: StepUs
) -> None:
    chosen, everybody = slack.choose(members, step_us), range(len(members))
    stock = len(members) / took(members, everybody, step_us)
    spent = slack.spent if isinstance(slack, MostKept) else 0.0
    assert len(chosen) / took(members, chosen, step_us) >= stock * (1 - spent) * (1 - 1e-9)


@given(running, step_laws)
def test_steps_are_shortened_only_where_that_keeps_more_targets(
    members: list[Running], step_us: StepUs
) -> None:
    """A target that steps of all would keep for good, and has been kept so far, is none of them."""
    chosen = KEPT.choose(members, step_us)
    if len(chosen) < len(members):
        everybody = Everybody(members, step_us)
        by_stock = sum(
            m.tpot_us == 0
            or (KEPT.aim * m.tpot_us >= everybody.us and KEPT.afford_us(m) >= everybody.us)
            for m in members
        )
        assert len(KEPT.kept(everybody)[1]) >= by_stock + KEPT.worth * len(members)


def overloaded(*, late_tokens: Sequence[float]) -> list[Running]:
    """Tight ones, each on its 51st token and so late, beside loose ones with long contexts."""
    tight = [Running(400, 50, (51 + late) * 44_000.0, 44_000.0) for late in late_tokens]
    return [*tight, *[Running(3_000, 20, 1_200_000.0, 132_000.0)] * 9]


def busy(count: int, context: int, longest: int) -> float:
    return 23_500.0 + 1.06 * context


def test_steps_of_all_have_made_most_late_for_good_and_whoever_has_just_come_is_kept() -> None:
    """The others' successors are worth it; their own targets set no pace any more."""
    late = overloaded(late_tokens=[20.0] * 6)
    assert KEPT.choose(late, busy) == [*range(15)]
    chosen = KEPT.choose([late[0]._replace(produced=0, since_first_us=0.0), *late[1:]], busy)
    assert set(range(6)) <= set(chosen)
    assert took(late, chosen, busy) <= 44_000


def test_a_target_that_steps_with_tokens_enough_cannot_keep_is_not_tried() -> None:
    members = overloaded(late_tokens=[0.0] * 6)
    assert len(KEPT.choose(members, busy)) < 15
    assert KEPT.choose(members, lambda n, c, m: 20_000.0 + busy(n, c, m)) == [*range(15)]
    assert len(MostKept(spent=0.5).choose(members, lambda n, c, m: 10_000.0 + busy(n, c, m))) < 15


def test_of_none_or_one_nobody_is_left_out() -> None:
    assert KEPT.choose([], busy) == []
    assert KEPT.choose(overloaded(late_tokens=[5.0])[:1], busy) == [0]


def test_whose_turn_has_come_steps_and_the_others_need_not() -> None:
    members = overloaded(late_tokens=[0.0] * 6)
    waited = members[-1]._replace(context_tokens=3_600, skipped=KEPT.most_skipped)
    assert 14 not in KEPT.choose([*members[:-1], waited._replace(skipped=0)], busy)
    chosen = KEPT.choose([*members[:-1], waited], busy)
    assert 14 in chosen
    assert len(chosen) < 15


def test_in_overload_the_targets_that_can_be_kept_are_and_no_more_are_tried() -> None:
    """Two tight ones could be kept by steps of themselves alone, and would cost eight others."""
    tight = [row(1_000)._replace(tpot_us=5_000.0, since_first_us=0.0)] * 2
    loose = [row(30_000)._replace(tpot_us=60_000.0, since_first_us=0.0)] * 8

    def step_us(count: int, context: int, longest: int) -> float:
        return 3_000.0 + 0.15 * context

    assert KEPT.choose([*tight, *loose], step_us) == [*range(10)]
    assert KEPT.choose([*tight * 3, *loose[:2]], step_us) == [*range(6)]


@given(running, step_laws)
def test_whoever_is_left_out_holds_more_than_whoever_is_not(
    members: list[Running], step_us: StepUs
) -> None:
    chosen = set(Slack().choose(members, step_us))
    inside = [m.context_tokens for i, m in enumerate(members) if i in chosen and not m.must_step]
    outside = [m.context_tokens for i, m in enumerate(members) if i not in chosen]
    assert not inside or not outside or max(inside) <= min(outside)


@pytest.mark.parametrize("slack", SLACKS)
@given(st.lists(st.integers(1, 131_072), min_size=1, max_size=10), step_laws)
def test_who_waits_no_turn_is_left_out_for_longer_than_the_bound(
    slack: Slack, contexts: list[int], step_us: StepUs
) -> None:
    """All of them late: nothing bounds the step, and the long ones would be left out for good."""
    skipped = [0] * len(contexts)
    for step in range(40):
        members = [
            Running(c, step, 1e9, TPOT_US, s) for c, s in zip(contexts, skipped, strict=True)
        ]
        chosen = set(slack.choose(members, step_us))
        skipped = [0 if i in chosen else s + 1 for i, s in enumerate(skipped)]
        assert max(skipped) <= slack.most_skipped


def test_a_long_context_waits_until_the_others_are_ahead_of_their_target() -> None:
    short = [row(4_000, slack_ms=50)] * 2
    assert Slack().choose([*short, row(120_000)], by_longest) == [0, 1]
    ahead = [Running(4_000, 99, 1_000_000.0, TPOT_US)] * 2
    assert Slack().choose([*ahead, row(120_000)], by_longest) == [0, 1, 2]


def test_who_would_be_late_before_the_next_choice_goes_before_short_ones_with_time() -> None:
    tight = [row(4_000, slack_ms=20)._replace(tpot_us=20_000.0)] * 2
    loose = row(12_000)._replace(tpot_us=90_000.0, produced=99)
    due, early = (loose._replace(since_first_us=9_000_000.0 - ms * 1e3) for ms in (20, 3_000))

    def step_us(count: int, context: int, longest: int) -> float:
        return 400.0 + 0.6 * context

    for place in range(2):
        others = [early, early, early]
        others[place] = due
        assert KEPT.choose([*tight, *others], step_us) == [0, 1, 2 + place]


def test_who_was_halted_may_catch_up_and_who_is_late_for_good_may_not() -> None:
    """A pause of all, as somebody joins, makes all late; without forgiveness nothing follows."""
    for late_tokens, chosen in ((5, [0, 1]), (40, [0, 1, 2])):
        halted = row(4_000, slack_ms=-late_tokens * TPOT_US / 1e3)
        members = [halted, halted, row(120_000)._replace(tpot_us=10 * TPOT_US)]
        assert KEPT.choose(members, by_longest) == chosen
        assert Slack().choose(members, by_longest) == [0, 1, 2]


def test_the_limit_is_that_of_the_strictest_whoever_joined_first() -> None:
    strict = Running(500, 100, 1_394_000.0, 20_000.0)
    relaxed = Running(500, 0, 40_000.0, 50_000.0)
    for members in ([strict, relaxed], [relaxed, strict]):
        assert Slack().limit_us(members) == pytest.approx(20_000)


def test_one_hopeless_request_stops_the_printed_rule_and_not_the_repaired_one() -> None:
    members = [row(4_000, slack_ms=30), row(4_000, slack_ms=30), row(120_000, slack_ms=-5_000)]
    assert Kairos().choose(members, by_longest) == [0, 1, 2]
    assert Slack().choose(members, by_longest) == [0, 1]


def test_the_printed_rule_leaves_out_a_long_one_that_lowers_tokens_per_second() -> None:
    members = [row(4_000), row(120_000), row(4_000)]
    assert Kairos().choose(members, by_longest) == [0, 2]
    assert All().choose(members, by_longest) == [0, 1, 2]


def test_online_is_filled_in_first_and_offline_gets_the_room_that_is_left() -> None:
    members = [row(60_000, online=False), row(60_000), row(60_000), row(60_000, online=False)]
    tight = OnlineFirst(ask_every=1)
    assert tight.choose(members, lambda n, c, m: 10_000.0 * n) == [0, 1, 2, 3]
    assert tight.choose(members, lambda n, c, m: 16_000.0 * n) == [0, 1, 2]
    assert tight.choose(members, lambda n, c, m: 24_000.0 * n) == [1, 2]
    assert tight.choose(members, lambda n, c, m: 90_000.0 * n) == [0]


PACED = OnlinePaced(over_steps=8)
CHOICE = 4
"""Steps that a choice is good for."""


def ridden(
    online: Sequence[int],
    offline: Sequence[int],
    target_us: float,
    real_us: StepUs,
    predicted_us: StepUs,
    tokens: int,
) -> tuple[list[float], int]:
    """How far the online requests are past their pace after each choice; the offline tokens."""
    contexts = [*online, *offline]
    produced = [0] * len(contexts)
    now_us, past_us = 0.0, []
    while produced[0] < tokens:
        members = [
            Running(
                context + made,
                made,
                now_us,
                target_us if i < len(online) else 0.0,
                is_online=i < len(online),
            )
            for i, (context, made) in enumerate(zip(contexts, produced, strict=True))
        ]
        chosen = PACED.choose(members, predicted_us)
        assert chosen[: len(online)] == list(range(len(online)))
        for _ in range(CHOICE):
            now_us += took(members, chosen, real_us)
            for i in chosen:
                produced[i] += 1
        past_us.append(now_us - produced[0] * PACED.fill * target_us)
    return past_us, sum(produced[len(online) :])


onlines = st.lists(st.integers(100, 8_000), min_size=1, max_size=8)
offlines = st.lists(st.integers(100, 60_000), max_size=8)


def room(online: Sequence[int], offline: Sequence[int], share: float) -> float:
    """A target between a step of the online requests, with some to spare, and that of all."""
    grown = [tokens + 200 for tokens in online]
    all_us = by_sum(len(online) + len(offline), sum(grown) + sum(offline) + 1_600, 0)
    alone_us = 1.1 * by_sum(len(grown), sum(grown), 0) / PACED.fill
    return alone_us + share * max(0.0, all_us - alone_us)


@given(onlines, offlines, st.floats(0, 1.2))
def test_what_is_lent_is_in_hand_so_that_nobody_falls_behind_its_pace(
    online: list[int], offline: list[int], share: float
) -> None:
    target_us = room(online, offline, share)
    past_us, _ = ridden(online, offline, target_us, by_sum, by_sum, 200)
    assert max(past_us) <= 1e-3


@given(onlines, offlines, st.floats(0, 1.2), st.floats(0.7, 1.4))
def test_the_mean_of_an_answer_meets_its_target_however_wrong_the_prediction_is(
    online: list[int], offline: list[int], share: float, bias: float
) -> None:
    target_us = room(online, offline, share)

    def predicted_us(count: int, context: int, longest: int) -> float:
        return by_sum(count, context, longest) / bias

    past_us, _ = ridden(online, offline, target_us, by_sum, predicted_us, 200)
    assert past_us[-1] <= (1 - PACED.fill) * target_us * 200


@given(onlines, st.lists(st.integers(100, 5_000), min_size=8, max_size=8), st.floats(0.75, 1.3))
def test_what_one_step_leaves_of_the_target_the_next_ones_use(
    online: list[int], offline: list[int], bias: float
) -> None:
    """Not far below the target either, wherever some offline work is left over."""
    target_us = room(online, offline, 0.5)

    def predicted_us(count: int, context: int, longest: int) -> float:
        return by_sum(count, context, longest) / bias

    past_us, made = ridden(online, offline, target_us, by_sum, predicted_us, 200)
    if made < len(offline) * 200:
        assert past_us[-1] >= -0.03 * target_us * 200


@given(running, step_laws)
def test_no_online_request_waits_and_offline_ones_that_are_taken_fit(
    members: list[Running], step_us: StepUs
) -> None:
    chosen = PACED.choose(members, step_us)
    first = {i for i, it in enumerate(members) if it.is_online or it.must_step}
    assert first <= set(chosen)
    if len(chosen) > max(1, len(first)):
        assert took(members, chosen, step_us) <= PACED.limit_us(members)


def test_a_request_that_is_late_for_good_stops_no_offline_work_and_one_that_is_late_does() -> None:
    def step_us(count: int, context: int, longest: int) -> float:
        return 10_000.0 * count

    for late_tokens, chosen in ((0, [0, 1, 2, 3]), (20, [0]), (40, [0, 1, 2, 3])):
        late = row(100, slack_ms=(1 - late_tokens) * TPOT_US / 1e3)
        others = [row(100, online=False)._replace(tpot_us=0.0)] * 9
        assert PACED.choose([late, *others], step_us) == chosen


def test_an_offline_target_bounds_a_step_but_has_no_pace_to_catch_up_with() -> None:
    late = Running(100, 10, 20 * TPOT_US, TPOT_US, is_online=False)
    assert PACED.limit_us([late]) == pytest.approx(PACED.fill * TPOT_US)
    assert PACED.limit_us([late._replace(is_online=True)]) < 0


def test_no_step_is_longer_than_half_as_long_again_as_the_target_whatever_is_in_hand() -> None:
    members = [Running(100, 1_000, 0.0, TPOT_US), *[row(100, online=False)._replace(tpot_us=0)] * 9]
    assert PACED.choose(members, lambda n, c, m: 10_000.0 * n) == [*range(7)]


@given(st.permutations(range(5)))
def test_equal_contexts_are_taken_in_the_order_they_joined(order: list[int]) -> None:
    members = [row(8_000, slack_ms=50 + i) for i in order]
    chosen = Slack().choose(members, lambda n, c, m: 5_000.0 * n**2)
    assert chosen == [0, 1]


def test_observed_steps_correct_the_table_where_they_were_seen_and_elsewhere() -> None:
    table = StepTable(by_sum, by_longest=False)
    for _ in range(50):
        table.observe(4, 40_000, 12_000, 2 * by_sum(4, 40_000, 12_000))
    assert table.step_us(4, 40_000, 12_000) == pytest.approx(2 * by_sum(4, 40_000, 12_000))
    assert table.step_us(9, 90_000, 12_000) == pytest.approx(2 * by_sum(9, 90_000, 12_000))
    assert len(table) == 1


def test_a_cell_follows_a_machine_that_has_become_slower() -> None:
    table = StepTable(by_longest, by_longest=True)
    for factor in (1.0,) * 40 + (1.5,) * 40:
        table.observe(4, 40_000, 12_000, factor * by_longest(4, 40_000, 12_000))
    assert table.step_us(4, 10, 12_000) == pytest.approx(1.5 * by_longest(4, 10, 12_000), rel=0.01)


def test_a_step_without_a_time_teaches_nothing() -> None:
    table = StepTable(by_sum, by_longest=False)
    table.observe(4, 40_000, 12_000, 0.0)
    assert len(table) == 0
