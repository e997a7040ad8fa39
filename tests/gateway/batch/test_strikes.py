"""How often a row is tried, and how long a batch waits for servers that are off the list."""

from __future__ import annotations

import pytest

from gateway.batch.absences import TRIALS, Absences
from gateway.batch.attempts import Later
from gateway.batch.strikes import DEATHS, ENGINE_ERRORS, Strikes
from gateway.errors import Code
from tests.gateway.batch.test_verdicts import row

SECOND = 1_000_000
ENGINES = Later(code=Code.UPSTREAM_FAILED, message="no such kernel", is_engines=True)
DEATH = Later(code=Code.UPSTREAM_FAILED, message="it broke off", is_death=True)
FLEETS = Later(code=Code.WORKERS_UNAVAILABLE, message="nobody is there")


@pytest.mark.parametrize(("outcome", "most"), [(ENGINES, ENGINE_ERRORS), (DEATH, DEATHS)])
def test_a_row_is_tried_so_often_and_not_more(outcome: Later, most: int) -> None:
    strikes = Strikes()
    told = [strikes.count(row(), outcome) for _ in range(most)]
    assert told == [False] * (most - 1) + [True]


def test_what_is_the_fleets_trouble_does_not_count() -> None:
    strikes = Strikes()
    assert not any(strikes.count(row(attempts=n), FLEETS) for n in range(100))
    assert len(strikes) == 0


def test_a_row_that_gets_on_in_between_may_see_any_number_of_servers_die() -> None:
    strikes = Strikes()
    told = [strikes.count(row(checkpoint_tokens=20 * (n // 10)), DEATH) for n in range(200)]
    assert not any(told)


def test_a_row_that_kills_at_the_same_token_each_time_is_given_up() -> None:
    strikes = Strikes()
    told = [strikes.count(row(checkpoint_tokens=500), DEATH) for _ in range(DEATHS)]
    assert told == [False] * (DEATHS - 1) + [True]


def test_what_other_gateways_have_ended_is_forgotten_with_its_batch() -> None:
    strikes = Strikes()
    for batch in (1, 2):
        strikes.count(row(batch=batch), ENGINES)
    strikes.keep_only({2})
    assert len(strikes) == 1


# A batch whose model nobody has.


def test_all_rows_of_one_bad_moment_count_once() -> None:
    absences = Absences()
    assert not any(absences.met(1, 0) for _ in range(1000))
    assert absences.pause_us(1, 0) == 5 * SECOND
    assert absences.pause_us(2, 0) == 0


def test_it_is_asked_about_for_ten_minutes_and_then_no_row_waits_for_it() -> None:
    absences, now_us, moments = Absences(), 0, list[int]()
    while not absences.met(1, now_us):
        moments.append(now_us // SECOND)
        now_us += absences.pause_us(1, now_us)
    assert moments == [0, 5, 15, 35, 75, 155, 315]
    assert (len(moments) + 1, now_us // SECOND) == (TRIALS, 615)
    assert absences.met(1, now_us)
    assert absences.pause_us(1, now_us) == 0


def test_an_answer_ends_an_absence_and_so_does_the_end_of_its_batch() -> None:
    absences = Absences()
    for batch in (1, 2, 3):
        absences.met(batch, 0)
    absences.over(1)
    absences.keep_only({1, 3})
    assert [absences.pause_us(batch, 0) for batch in (1, 2, 3)] == [0, 0, 5 * SECOND]
