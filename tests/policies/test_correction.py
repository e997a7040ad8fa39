from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.correction import FASTEST, SLOWEST, Correction, observe

PREDICTED_S = 0.020


def after(ratios: list[float], correction: Correction | None = None) -> Correction:
    found = correction or Correction()
    for step, ratio in enumerate(ratios, start=1):
        found = observe(
            found, predicted_s=PREDICTED_S, measured_s=PREDICTED_S * ratio, now_us=step * 1000
        )
    return found


def noisy(ratio: float, count: int, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [ratio * math.exp(chance.gauss(0, 0.05)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_a_server_twice_as_slow_is_learnt_within_20_steps_and_unlearnt_within_20(seed: int) -> None:
    before = after(noisy(1.0, 50, seed))
    slow = after(noisy(2.0, 20, seed + 100), before)
    again = after(noisy(1.0, 20, seed + 200), slow)
    assert slow.factor == pytest.approx(2.0, rel=0.06)
    assert again.factor == pytest.approx(1.0, rel=0.06)


@given(st.lists(st.sampled_from([0.01, 0.1, 10.0, 1000.0]), max_size=7))
def test_seven_strange_steps_of_fifteen_change_nothing(strange: list[float]) -> None:
    found = after([*strange, *[1.5] * (15 - len(strange))])
    assert found.factor == pytest.approx(1.5)


def test_the_first_strange_steps_are_not_believed() -> None:
    assert after([40.0] * 7).factor == 1.0
    assert after([2.0] * 8).factor == pytest.approx(2.0)


@given(st.lists(st.floats(1e-6, 1e6), max_size=40))
def test_the_factor_stays_within_what_a_working_server_can_be(ratios: list[float]) -> None:
    found = after(ratios)
    assert FASTEST <= found.factor <= SLOWEST
    assert found.error >= 0


@pytest.mark.parametrize("measured", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_counted_and_ignored(measured: float) -> None:
    known = after([1.5] * 15)
    found = observe(known, predicted_s=PREDICTED_S, measured_s=measured, now_us=10**9)
    assert found.refused == 1
    assert (found.factor, found.steps, found.updated_us) == (known.factor, 15, known.updated_us)


def test_size_age_and_error_are_told() -> None:
    found = after([1.5] * 15)
    assert found.size == pytest.approx(0.5)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert found.age_us(17_000) == 2000
    assert after(noisy(1.5, 15, 1)).error == pytest.approx(0.034, abs=0.02)


def test_a_correction_that_saw_nothing_corrects_nothing() -> None:
    assert Correction().factor == 1.0
    assert Correction().error == 0.0
