from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.breaker import Breaker, BreakerRule

RULE = BreakerRule(failures=3, cooldown_us=100, cooldown_max_us=400)
STEPS = st.lists(st.sampled_from(["fail", "succeed", "try", "shrug", "wait"]), max_size=40)


def played(steps: list[str]) -> tuple[Breaker, int]:
    breaker, now_us, trial = Breaker(RULE), 1, 0
    for step in steps:
        match step:
            case "fail":
                breaker.failed(now_us)
            case "succeed":
                breaker.succeeded()
            case "try" if breaker.allows(now_us):
                trial = breaker.try_out()
            case "shrug":
                breaker.gave_no_verdict(trial)
            case _:
                now_us += 70
    return breaker, now_us


def opened() -> Breaker:
    breaker = Breaker(RULE)
    for _ in range(3):
        breaker.failed(0)
    return breaker


@given(STEPS)
def test_one_success_closes_it_whatever_came_before(steps: list[str]) -> None:
    breaker, now_us = played(steps)
    breaker.succeeded()
    assert breaker.is_closed
    assert breaker.allows(now_us)


@given(STEPS)
def test_it_never_stays_open_longer_than_the_longest_pause(steps: list[str]) -> None:
    breaker, now_us = played(steps)
    assert breaker.open_until_us <= now_us + RULE.cooldown_max_us


@given(STEPS)
def test_there_is_one_trial_at_a_time(steps: list[str]) -> None:
    breaker, now_us = played([*steps, "fail", "fail", "fail"])
    later_us = now_us + RULE.cooldown_max_us
    if breaker.allows(later_us):
        assert breaker.try_out()
    assert not breaker.allows(later_us)


def test_fewer_failures_than_the_rule_says_leave_it_closed() -> None:
    breaker, _ = played(["fail", "fail", "succeed", "fail", "fail"])
    assert breaker.is_closed


def test_it_opens_for_a_while_and_then_lets_one_try() -> None:
    breaker = opened()
    assert (breaker.allows(99), breaker.allows(100)) == (False, True)
    assert breaker.try_out()
    assert not breaker.allows(100)


def test_the_pause_doubles_with_each_failed_trial() -> None:
    breaker, now_us, pauses = opened(), 0, []
    for _ in range(4):
        now_us = breaker.open_until_us
        breaker.try_out()
        breaker.failed(now_us)
        pauses.append(breaker.open_until_us - now_us)
    assert pauses == [200, 400, 400, 400]


def test_failures_of_earlier_jobs_do_not_make_the_pause_longer() -> None:
    breaker = opened()
    breaker.failed(50)
    assert breaker.open_until_us == 100


def test_a_trial_on_a_closed_breaker_is_none() -> None:
    assert not Breaker(RULE).try_out()


def test_its_state_can_be_read() -> None:
    breaker = opened()
    assert repr(breaker) == "<Breaker open, 3 in a row>"
    breaker.try_out()
    assert "half-open" in repr(breaker)
    assert "closed" in repr(Breaker(RULE))


def test_a_trial_that_has_its_verdict_does_not_end_a_later_one() -> None:
    breaker = opened()
    first = breaker.try_out()
    breaker.succeeded()
    for _ in range(3):
        breaker.failed(200)
    second = breaker.try_out()
    breaker.gave_no_verdict(first)
    assert not breaker.allows(1_000)
    breaker.gave_no_verdict(second)
    assert breaker.allows(1_000)
