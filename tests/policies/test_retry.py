from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.events import Fault
from policies.retry import RetryBudget, RetryRule, continued
from policies.types import Kind
from tests.gateway.talk import SECOND, offline, online

TOKENS = st.integers(1, 10_000)


@given(st.lists(TOKENS), st.lists(TOKENS))
def test_retries_stay_below_their_share_of_the_load(fresh: list[int], retried: list[int]) -> None:
    rule = RetryRule(burst_tokens=5000, share=0.2)
    budget = RetryBudget(rule)
    spent = 0
    for tokens in fresh:
        budget.earn(online("a", tokens))
    for tokens in retried:
        job = online("a", tokens)
        if budget.refusal(job, 1, Fault.DIED, 0) is None:
            budget.spend(job)
            spent += tokens
    assert spent <= 5000
    assert budget.tokens >= 0


@given(st.integers(1, 200))
def test_pauses_grow_and_are_bounded(attempt: int) -> None:
    rule = RetryRule()
    assert rule.delay_us(Kind.ONLINE, attempt) == 0
    pause_us = rule.delay_us(Kind.OFFLINE, attempt)
    assert pause_us <= rule.delay_us(Kind.OFFLINE, attempt + 1) <= rule.backoff_max_us


def test_offline_jobs_have_more_attempts() -> None:
    budget = RetryBudget(RetryRule())
    assert budget.refusal(online("a"), 3, Fault.DIED, 0) == "attempts_exhausted"
    assert budget.refusal(offline("a"), 3, Fault.DIED, 0) is None


def test_a_smaller_budget_takes_away_what_was_left() -> None:
    budget = RetryBudget(RetryRule(burst_tokens=1000))
    budget.adopt(RetryRule(burst_tokens=10))
    assert budget.refusal(online("a", 11), 1, Fault.DIED, 0) == "retry_budget_spent"


def test_a_job_that_generated_nothing_is_the_same_job() -> None:
    job = online("a")
    assert continued(job, 0, 99) is job


@given(st.integers(1, 500), st.integers(0, 10**9))
def test_what_was_generated_moves_from_the_answer_to_the_prompt(tokens: int, now_us: int) -> None:
    rest = continued(online("a", 100, max_tokens=200), tokens, now_us)
    assert rest.prompt_tokens == 100 + tokens
    assert rest.max_tokens == max(1, 200 - tokens)
    assert rest.give_up_us >= now_us + 2 * SECOND


def test_an_offline_window_does_not_move() -> None:
    job = offline("a")
    assert continued(job, 5, 10**12).give_up_us == job.give_up_us
