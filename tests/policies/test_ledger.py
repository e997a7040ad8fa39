from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.breaker import Breaker, BreakerRule
from policies.ledger import Ledger, PrefillRate
from tests.gateway.talk import load, unified


def ledger(**fields: Any) -> Ledger:
    return Ledger(unified(**fields), Breaker(BreakerRule()))


def test_no_rate_is_claimed_on_little_evidence() -> None:
    rate = PrefillRate()
    rate.begin(0)
    rate.done(2000, 1000)
    assert rate.tokens_per_us is None


def test_idle_time_does_not_count() -> None:
    rate = PrefillRate()
    for start_us in (0, 50_000_000):
        rate.begin(start_us)
        rate.done(3000, start_us + 1_000_000)
    assert rate.tokens_per_us == pytest.approx(0.003)


def test_the_last_seconds_count_most() -> None:
    rate = PrefillRate()
    rate.begin(0)
    for second in range(1, 60):
        rate.done(1000 if second < 30 else 9000, second * 1_000_000)
    assert rate.tokens_per_us == pytest.approx(0.009, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5_000_000)), min_size=1))
def test_a_rate_lies_between_the_slowest_and_the_fastest(steps: list[tuple[int, int]]) -> None:
    rate, now_us = PrefillRate(), 0
    rate.begin(now_us)
    for tokens, took_us in steps:
        now_us += took_us
        rate.done(tokens, now_us)
    seen = [tokens / took_us for tokens, took_us in steps]
    if rate.tokens_per_us is not None:
        assert min(seen) * 0.999 <= rate.tokens_per_us <= max(seen) * 1.001


def test_work_on_prompts_that_were_taken_off_is_no_evidence() -> None:
    books, now_us = ledger(), 0
    for _ in range(20):
        for prompt in (30_000, 30_000, 1_000):  # the second one is taken off half way
            books.add_prefill(prompt, now_us)
        books.prefilled(30_000, now_us + 3_000_000)
        books.end_prefill(30_000)
        books.prefilled(1_000, now_us + 4_600_000)
        now_us += 5_000_000
    assert books.prefill_tokens_per_us == pytest.approx(0.01)


@given(st.lists(st.integers(0, 5000), min_size=2))
def test_foreign_tokens_are_never_more_than_two_reports_agree_on(totals: list[int]) -> None:
    books = ledger()
    books.add_decode(1000, 1500)
    for total in totals:
        books.correct(load(total))
    assert books.foreign_tokens == max(0, min(totals[-2:]) - 1000)


def test_an_unbelievable_report_takes_nothing_away() -> None:
    books = ledger()
    books.add_decode(1000, 1500)
    books.correct(load(0))
    books.correct(load(0))
    assert (books.foreign_tokens, books.reserved_tokens) == (0, 1500)


def test_a_forgotten_report_takes_two_to_be_believed_again() -> None:
    books = ledger()
    books.correct(load(500))
    books.correct(load(500))
    books.forget_report()
    books.correct(load(500))
    assert books.foreign_tokens == 0


@pytest.mark.parametrize(
    ("configured", "told", "valid"), [(0, 7, 7), (5, 0, 5), (5, 7, 5), (9, 7, 7)]
)
def test_the_tighter_of_two_limits_holds(configured: int, told: int, valid: int) -> None:
    books = ledger(kv_tokens=configured, max_running=configured)
    books.correct(load(capacity_tokens=told, max_running=told))
    assert (books.kv_tokens, books.max_running) == (valid, valid)


def test_what_is_booked_can_be_read() -> None:
    books = ledger()
    books.add_prefill(10, 0)
    books.add_decode(20, 30)
    assert repr(books) == "<Ledger u: 1 prefills of 10, 1 decodes of 20, 30 reserved>"
    assert not books.is_empty
