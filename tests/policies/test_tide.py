from __future__ import annotations

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


def test_what_was_there_in_one_second_of_ten_is_not_expected() -> None:
    assert after([2] * 56 + [9] * 4 + [2]).expected == 0
    assert after([9, 9, 9, 9, 2, 2, 2, 2, 2, 2] * 6).expected == 7


def test_nothing_is_expected_beyond_a_flood_that_is_there() -> None:
    assert after([2] * 30 + [9] * 30).expected == 0


def test_a_minute_of_silence_is_forgotten() -> None:
    tide = after([9] * 60 + [0])
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


def test_the_pace_is_known_after_a_few_tokens_and_forgotten_when_all_have_gone() -> None:
    tide = Tide()
    tide.came(1, 50, 0)
    tide.paced(100, 4)
    assert tide.pace_us == 0
    tide.paced(300, 5)
    assert 40 < tide.pace_us < 50
    tide.went(50)
    assert tide.pace_us == 0


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80))
def test_no_more_is_expected_than_the_last_minute_has_seen(levels: list[int]) -> None:
    tide = after(levels)
    assert 0 <= tide.expected <= max(levels) - tide.count
