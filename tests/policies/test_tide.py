from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from policies.tide import Tide

SECOND = 1_000_000


def after(levels: list[int], tide: Tide | None = None) -> Tide:
    """One level a second, reached at the beginning of it."""
    tide = tide or Tide()
    for second, level in enumerate(levels, start=1):
        while tide.count > level:
            tide.went(50_000)
        while tide.count < level:
            tide.came(100, 50_000, second * SECOND)
        tide.roll(second * SECOND)
    return tide


def test_a_rise_that_comes_in_fewer_seconds_than_one_in_ten_is_not_expected() -> None:
    assert after([2] * 55 + [9] + [2] * 4).expected == 0
    assert after([2, 9] * 30).expected == 7


def test_a_flood_that_stays_is_not_expected_again() -> None:
    assert after([2] * 30 + [9] * 30).expected == 0
    assert after([2] * 30 + [9] * 30 + [2] * 5).expected == 0


def test_a_minute_of_silence_is_forgotten() -> None:
    tide = after([0, 9] * 30)
    assert tide.expected == 9
    tide.roll(200 * SECOND)
    assert tide.expected == 0


def test_the_tightest_target_is_that_of_those_present() -> None:
    tide = Tide()
    assert tide.tightest_us(70) == 70
    for target_us in (50, 20, 20, 0):
        tide.came(1, target_us, 0)
    tide.went(20)
    assert tide.tightest_us(70) == 20
    tide.went(20)
    assert tide.tightest_us(70) == 50


def test_the_pace_is_known_after_a_while_and_forgotten_when_all_have_gone() -> None:
    tide = Tide()
    tide.came(1, 50, 0)
    tide.paced(100_000, 4, 1)
    assert tide.pace_us == 0
    tide.paced(100_000, 4, 2)
    tide.paced(100_000, 2, 3)
    assert 29_000 < tide.pace_us < 31_000
    tide.went(50)
    assert (tide.pace_us, tide.last_pace_us) == (0, 0)


def test_many_streams_that_are_held_up_at_once_are_one_piece_of_evidence() -> None:
    tide = Tide()
    for _ in range(20):
        tide.paced(100_000, 1, 1)
    assert tide.pace_us == 0


def test_until_better_is_seen_the_last_pace_stands() -> None:
    tide = Tide()
    tide.paced(300_000, 3, 1)
    tide.forget_pace()
    assert (tide.pace_us, tide.last_pace_us) == (0, 100_000)
    tide.paced(300_000, 10, 2)
    assert tide.last_pace_us == tide.pace_us == 30_000


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80))
def test_no_more_is_expected_than_has_come_at_once(levels: list[int]) -> None:
    tide = after(levels)
    rises = [after - before for before, after in pairwise([0, *levels])]
    assert 0 <= tide.expected <= max(0, *rises)
