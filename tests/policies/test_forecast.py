from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.forecast import Accuracy
from policies.forecast import FORECAST, LAST, Outlook, arima, holt

LOADS = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=80)
ODD = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
BAD_LOADS = st.lists(st.one_of(st.floats(0.0, 1e6), ODD), max_size=80)


def fed(values: list[float] | list[float | None], **settings: float) -> Outlook:
    outlook = Outlook(quantile=settings.get("quantile", 0.9))
    for value in values:
        outlook.observe(value)
    return outlook


def autoregressive(count: int, weight: float, seed: int = 1) -> list[float]:
    random, value, found = Random(seed), 0.0, []
    for _ in range(count):
        value = weight * value + random.gauss(0.0, 1.0)
        found.append(100.0 + 5 * value)
    return found


def errors(outlook: Outlook, values: list[float]) -> dict[str, float]:
    for value in values:
        outlook.observe(value)
    return dict(outlook.predict().errors)


# The forecasters.


@given(LOADS)
def test_every_forecaster_answers_any_series_with_a_number(series: list[float]) -> None:
    for forecaster in FORECAST.values():
        assert math.isfinite(forecaster(series))


@given(st.floats(0.0, 1e6), st.integers(1, 70))
def test_a_constant_series_goes_on(value: float, count: int) -> None:
    for forecaster in FORECAST.values():
        assert forecaster([value] * count) == pytest.approx(value, abs=1e-6)


def test_holt_looks_ahead_on_a_ramp_and_not_too_far() -> None:
    ramp = [10.0 * step for step in range(1, 40)]
    assert ramp[-1] < holt(ramp) < ramp[-1] + 10.0


def test_arima_finds_an_autoregression_of_first_order() -> None:
    series = autoregressive(400, 0.8)
    assert arima(series) - 100.0 == pytest.approx(0.8 * (series[-1] - 100.0), abs=1.5)


def test_arima_finds_an_alternation_that_smoothing_cannot() -> None:
    series = [100.0 + 20.0 * (-1) ** step + 0.1 * (step % 7) for step in range(60)]
    assert arima(series) == pytest.approx(120.0, abs=2.0)
    assert FORECAST["ewma"](series) < 110.0


def test_arima_goes_on_with_a_noisy_ramp() -> None:
    random = Random(3)
    ramp = [100.0 + 5.0 * step + random.gauss(0.0, 1.0) for step in range(60)]
    assert arima(ramp) == pytest.approx(400.0, abs=6.0)


def test_few_points_are_answered_with_the_last_of_them() -> None:
    assert arima([3.0, 9.0, 4.0]) == 4.0


# Who is believed.


def test_without_any_history_nothing_is_promised() -> None:
    told = Outlook().predict()
    assert (told.point, told.upper, told.by) == (0.0, 0.0, LAST)


def test_one_value_is_believed_with_a_margin() -> None:
    told = fed([80.0]).predict()
    assert (told.point, told.upper) == (80.0, 96.0)


def test_what_is_forgotten_is_no_measure_any_more() -> None:
    random = Random(5)
    outlook = fed([random.choice([10.0, 90.0]) for _ in range(40)])
    assert outlook.predict().upper > 20.0
    outlook.forget()
    outlook.observe(10.0)
    assert outlook.predict().upper == fed([10.0]).predict().upper


def test_on_a_random_walk_the_last_value_is_believed() -> None:
    random, values = Random(5), [1000.0]
    for _ in range(200):
        values.append(max(1.0, values[-1] + random.gauss(0.0, 20.0)))
    assert fed(values).predict().by == LAST


def test_where_another_forecaster_is_clearly_better_it_is_believed() -> None:
    told = fed([100.0 + 20.0 * (-1) ** step for step in range(100)]).predict()
    assert told.by == "arima"
    assert told.errors["arima"] < told.errors[LAST] / 4


@given(LOADS, st.integers(0, 10))
def test_the_one_believed_has_not_been_worse_than_the_last_value(
    values: list[float], seed: int
) -> None:
    told = fed([*values, *autoregressive(20, 0.5, seed)]).predict()
    assert told.errors[told.by] <= told.errors[LAST] + 1e-12


def test_a_forecaster_that_answers_nonsense_does_no_harm() -> None:
    outlook = Outlook(forecasters={"mad": lambda _: math.nan, "wild": lambda _: 1e30})
    found = errors(outlook, autoregressive(50, 0.5))
    assert outlook.predict().by == LAST
    assert found["mad"] == pytest.approx(found[LAST])
    assert outlook.predict().upper < 200.0


# The upper quantile.


@given(BAD_LOADS)
@example([*[0.0] * 11, 2.1e154, 0.0])  # its square is infinite
def test_any_history_gives_numbers_in_order(values: list[float | None]) -> None:
    told = fed(values).predict()
    assert 0.0 <= told.point <= told.upper
    assert math.isfinite(told.upper)


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=60))
def test_the_same_history_gives_the_same_forecast(values: list[float]) -> None:
    assert fed(values).predict() == fed(values).predict()


@given(st.lists(st.floats(1.0, 1e4), min_size=1, max_size=40), st.integers(0, 39))
def test_a_gap_teaches_nothing(values: list[float], at: int) -> None:
    with_gap: list[float | None] = [*values[:at], math.nan, None, *values[at:]]
    assert fed(with_gap).predict() == fed(values).predict()


@pytest.mark.parametrize("quantile", [0.8, 0.9, 0.95])
def test_the_upper_forecast_holds_as_often_as_it_says(quantile: float) -> None:
    outlook = Outlook(quantile=quantile, forecasters={"holt": holt})
    accuracy = Accuracy()
    for at, value in enumerate(autoregressive(1500, 0.7)):
        if at >= 100:
            accuracy.add(outlook.predict().upper, value)
        outlook.observe(value)
    assert accuracy.coverage == pytest.approx(quantile, abs=0.03)


def test_a_flat_zero_promises_nothing_and_survives_the_first_load() -> None:
    silent = fed([0.0] * 50)
    assert silent.predict().upper == pytest.approx(0.0, abs=1e-6)
    silent.observe(40.0)
    assert silent.predict().upper >= 40.0


def test_a_spike_of_fifty_times_does_not_outlive_its_window() -> None:
    outlook = fed([100.0] * 40 + [5000.0] + [100.0] * 10)
    assert outlook.predict().upper < 200.0
    for _ in range(60):
        outlook.observe(100.0)
    assert outlook.predict().point == pytest.approx(100.0)


def test_in_a_spike_the_forecast_is_bounded() -> None:
    told = fed([100.0] * 40 + [5000.0]).predict()
    assert told.point <= 10_000.0


def test_memory_is_bounded() -> None:
    assert len(fed([1.0] * 1000)) == 60


# The account.


def test_the_account_of_forecasts_adds_up() -> None:
    accuracy = Accuracy()
    for told, value in ((10.0, 8.0), (10.0, 16.0), (5.0, 0.0)):
        accuracy.add(told, value, by="last")
    assert accuracy.mape == pytest.approx((2 / 8 + 6 / 16) / 2)
    assert (accuracy.under, accuracy.over) == (6 / 24, 7 / 24)
    assert (accuracy.coverage, accuracy.believed) == (2 / 3, {"last": 3})


def test_an_empty_account_claims_nothing() -> None:
    accuracy = Accuracy()
    assert (accuracy.mape, accuracy.under, accuracy.coverage) == (None, None, None)
