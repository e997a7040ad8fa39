"""Just enough victims, the right ones, and no storm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.preempt import (
    AbortBudget,
    AbortRule,
    Ahead,
    ForSlack,
    Leaving,
    Need,
    Stay,
    Victim,
    Victims,
)
from policies.types import Pool, Resume
from tests.gateway.talk import SECOND, online
from tests.policies.test_colocation import batch, chat, ledger

RULE = ForSlack(tpot_us=20_000, pulls=True)


def victim(name: str, sent_us: int = 0, **fields: Any) -> Victim:
    values = {"prefill_tokens": 0, "context_tokens": 2000, "reserved_tokens": 2500}
    return Victim(name, sent_us=sent_us, **(values | fields))


def prompt(name: str, tokens: int, sent_us: int = 0, **fields: Any) -> Victim:
    return victim(name, sent_us, prefill_tokens=tokens, **fields)


def ids(victims: Victims) -> str:
    return "".join(each.job_id for each in victims)


def ahead(victims: Victims, under_way: float = 0.0, chunk: int = 2000) -> Ahead:
    """At ten tokens a millisecond."""
    tokens = sum(v.prefill_tokens for v in victims) - under_way
    return Ahead(tokens, under_way, 0.01, chunk)


def cleared(*victims: Victim, tokens: int = 1000, now_us: int = 0, **more: Any) -> str:
    """For a prompt that has two seconds, of which it should need one."""
    chosen = RULE.for_prefill(online("x", tokens), ahead(victims, **more), victims, now_us)
    return ids(chosen)


def test_a_prompt_that_will_be_in_time_displaces_nobody() -> None:
    assert cleared(prompt("a", 5000), prompt("b", 3000, 1)) == ""


def test_the_newest_prompts_go_until_it_will_be_in_time() -> None:
    three = prompt("a", 9000), prompt("b", 3000, 1), prompt("c", 3000, 2)
    assert cleared(*three) == "cb"
    assert cleared(*three, tokens=100) == "cb"
    assert cleared(*three[:2], tokens=200) == "b"


def test_time_that_has_passed_counts() -> None:
    two = prompt("a", 5000), prompt("b", 3000, 1)
    assert cleared(*two, now_us=400_000) == "b"
    assert cleared(*two, now_us=900_000) == "ba"


def test_what_ends_within_a_chunk_is_let_finish() -> None:
    assert cleared(prompt("a", 12_000), under_way=10_500, now_us=900_000) == ""
    assert cleared(prompt("a", 12_000), under_way=9000, now_us=900_000) == "a"


def test_while_no_rate_is_known_a_chunk_is_as_much_as_may_lie_before_it() -> None:
    for tokens, chosen in ((1500, ""), (2500, "a")):
        victims = [prompt("a", tokens)]
        before = Ahead(tokens, 0.0, None, 2000)
        assert ids(RULE.for_prefill(online("x"), before, victims, 0)) == chosen


def test_who_gave_way_often_is_spared_until_the_target_itself_is_at_stake() -> None:
    old = prompt("a", 12_000, 5, preemptions=3)
    assert cleared(old) == ""
    assert cleared(old, prompt("b", 4000, 4)) == "b"
    assert cleared(old, now_us=1_500_000) == "a"


def test_enough_go_to_make_room_and_nobody_if_that_is_not_enough() -> None:
    three = [victim("a", 0), victim("b", 1), victim("c", 2)]
    assert ids(RULE.for_decode(Need(1, 0), three)) == "c"
    assert ids(RULE.for_decode(Need(0, 2600), three)) == "cb"
    assert ids(RULE.for_decode(Need(0, 9000), three)) == ""


def test_those_who_lose_least_go_first() -> None:
    four = [
        victim("p", 9, preemptions=3),
        victim("r", 8, resume=Resume.RESTART),
        victim("t", 7, flows=False),
        victim("d", 1),
    ]
    assert ids(RULE.for_decode(Need(4, 0), four)) == "dtrp"


def test_steps_are_shortened_to_the_target_and_no_further() -> None:
    strict = batch(chat(ledger(), 30, 12_000), 60)
    assert strict.steps is not None
    victims = [victim(f"{i:02}", i) for i in range(60)]
    chosen = RULE.over(strict, Leaving(), victims)
    left, context = strict.decodes - len(chosen), strict.context_tokens - 2000 * len(chosen)
    assert 0 < len(chosen) < 60
    assert strict.steps.decode_us(left, context) <= 0.98 * 12_000
    assert strict.steps.decode_us(left + 1, context + 2000) > 0.98 * 12_000
    assert chosen[0].job_id == "59"


def test_those_who_leave_already_are_counted_as_gone() -> None:
    strict = batch(chat(ledger(), 30, 12_000), 60)
    victims = [victim(f"{i:02}", i) for i in range(60)]
    count = len(RULE.over(strict, Leaving(), victims))
    leaving = Leaving(count, 0, 2000 * count, 2500 * count)
    assert RULE.over(strict, leaving, victims[:-count]) == []


def test_nobody_is_shed_where_no_online_job_is() -> None:
    assert RULE.over(batch(ledger(), 200), Leaving(), [victim("a")]) == ()


def test_the_longest_goes_first_where_attention_bounds_the_step() -> None:
    strict = batch(chat(ledger(), 2), 60, context=6000)
    victims = [victim("a", 1, context_tokens=9000), victim("b", 2, context_tokens=3000)]
    longest = ForSlack(tpot_us=20_000, by_bottleneck=True)
    assert RULE.over(strict, Leaving(), victims)[0].job_id == "b"
    assert longest.over(strict, Leaving(), victims)[0].job_id == "a"


@given(
    st.integers(0, 40),
    st.integers(8_000, 40_000),
    st.integers(0, 120),
    st.sampled_from([0, 300_000]),
)
def test_whenever_somebody_has_to_go_it_is_worth_a_look(
    chats: int, tpot_us: int, batched: int, paced_us: int
) -> None:
    strict = batch(chat(ledger(), chats, tpot_us), batched)
    if paced_us:
        strict.paced(paced_us, 10, 1)
    victims = [victim(f"{i:03}", i) for i in range(batched)]
    assert RULE.may_be_over(strict) or not RULE.over(strict, Leaving(), victims)
    assert not Stay().may_be_over(strict)


def test_a_pace_that_is_seen_to_be_too_slow_costs_one_at_a_time() -> None:
    unknown = batch(chat(ledger(), 2), 2)
    unknown.predict_by(None)
    victims = [victim("a", 1), victim("b", 2)]
    assert RULE.over(unknown, Leaving(), victims) == ()
    unknown.paced(300_000, 10, 1)
    assert ids(RULE.over(unknown, Leaving(), victims)) == "b"
    assert RULE.over(unknown, Leaving(jobs=1), victims) == ()


def test_work_moves_to_a_strict_server_when_its_shorter_steps_pay_for_the_prompt() -> None:
    strict, relaxed = chat(ledger(), 2), batch(ledger(pool=Pool.RELAXED), 150, context=3000)
    victims = [victim("a", left_tokens=2.0), victim("b", left_tokens=500.0)]
    assert RULE.pull(strict, relaxed, victims[:1]) is None
    assert RULE.pull(strict, relaxed, victims[1:]) == victims[1]
    assert RULE.may_pull(strict, relaxed)
    assert not ForSlack(pulls=False).may_pull(strict, relaxed)


def test_what_could_not_go_on_or_moved_often_stays() -> None:
    strict, relaxed = chat(ledger(), 2), batch(ledger(pool=Pool.RELAXED), 150, context=3000)
    for fields in ({"resume": Resume.RESTART}, {"flows": False}, {"preemptions": 3}):
        assert RULE.pull(strict, relaxed, [victim("a", left_tokens=500.0, **fields)]) is None


def test_without_preemption_everybody_stays() -> None:
    strict = batch(chat(ledger(), 30), 300)
    rule, all_of_them = Stay(), [prompt("a", 90_000)]
    assert rule.for_prefill(online("x"), ahead(all_of_them), all_of_them, SECOND) == ()
    assert rule.for_decode(Need(1, 1), all_of_them) == ()
    assert rule.over(strict, Leaving(), all_of_them) == ()
    assert rule.pull(strict, strict, all_of_them) is None


PROMPTS = st.lists(
    st.builds(
        prompt,
        st.uuids().map(str),
        st.integers(1, 20_000),
        st.integers(0, 1000),
        preemptions=st.integers(0, 4),
    ),
    max_size=8,
    unique_by=lambda v: v.job_id,
)


@given(PROMPTS, st.integers(1, 9000), st.integers(0, 3 * SECOND))
def test_no_victim_is_taken_for_nothing(victims: list[Victim], tokens: int, now_us: int) -> None:
    """Without the last one chosen of the unprotected, the prompt would not be in time."""
    job = online("x", tokens)
    chosen = RULE.for_prefill(job, ahead(victims), victims, now_us)
    assert len({v.job_id for v in chosen}) == len(chosen)
    fresh = [v for v in chosen if v.preemptions < RULE.protect_after]
    if fresh:
        left = sum(v.prefill_tokens for v in victims) - sum(v.prefill_tokens for v in fresh[:-1])
        assert now_us + (left + tokens) / 0.01 > job.deadline_us / 2


@pytest.mark.parametrize("seconds", [0, 1, 5])
def test_aborts_are_rationed(seconds: int) -> None:
    budget = AbortBudget(AbortRule(per_s=2, burst=10))
    assert budget.left(0) == 10
    budget.spend(10)
    assert budget.left(seconds * SECOND) == {0: 0, 1: 0, 5: 10}[seconds]


def test_a_budget_that_was_spent_stays_shut_until_half_is_back() -> None:
    budget = AbortBudget(AbortRule(per_s=2, burst=10))
    budget.spend(10)
    told = [budget.left(us) for us in (SECOND, 2 * SECOND, 3 * SECOND)]
    assert (told, budget.shut) == ([0, 0, 6], 1)
    budget.adopt(AbortRule(per_s=2, burst=3))
    assert budget.left(3 * SECOND) == 3


@given(st.lists(st.tuples(st.integers(0, SECOND), st.integers(0, 9)), max_size=60))
def test_no_more_is_aborted_than_was_earned(wishes: list[tuple[int, int]]) -> None:
    budget, now_us, spent = AbortBudget(AbortRule(per_s=5, burst=8)), 0, 0
    for wait_us, wish in wishes:
        now_us += wait_us
        taken = min(wish, budget.left(now_us))
        budget.spend(taken) if taken else None
        spent += taken
    assert spent <= 8 + 5 * now_us / SECOND + 1e-6


@given(st.integers(0, 60), st.integers(0, 200), st.integers(1, 6000), st.floats(0, 1e5))
def test_where_a_pull_is_not_worth_a_look_nobody_is_pulled(
    chats: int, jobs: int, context: int, left_tokens: float
) -> None:
    strict = chat(ledger(), chats)
    relaxed = batch(ledger(pool=Pool.RELAXED), jobs, context)
    victims = [victim("a", context_tokens=context, left_tokens=left_tokens)]
    assert RULE.may_pull(strict, relaxed) or RULE.pull(strict, relaxed, victims) is None
