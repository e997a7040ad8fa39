from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from policies.calibration import (
    CalibrationError,
    DecodeMoments,
    Sample,
    Setup,
    fit,
    held_out,
    least_squares,
    line_from_moments,
    sample_from_moments,
    samples_from_timings,
    solve,
    summarise,
)
from policies.constants import BOUNDS, NUMBERS, Constants
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import Batch, Parallel, Phase, decode_batch, prefill_batch
from policies.shipped import TYPICAL

SETUP = Setup(
    model=model_named("Llama-3.1-8B"), device=device_named("h100"), parallel=Parallel(tp=1)
)
TRUE = replace(
    TYPICAL,
    gemm_efficiency=0.62,
    weight_efficiency=0.9,
    kv_efficiency=0.7,
    decode_layer_us=60.0,
    source="made up for this test",
)
BATCHES: list[Batch] = [
    *(
        prefill_batch([(tokens, 0)] * count)
        for tokens in (128, 1024, 4096, 8192)
        for count in (1, 2, 4)
    ),
    *(
        decode_batch(count, count * length)
        for count in (1, 16, 128)
        for length in (128, 1024, 2048, 4096)
    ),
]


def measured(noise: float = 0.0, factor: Callable[[Batch], float] = lambda _: 1.0) -> list[Sample]:
    chance = random.Random(7)
    cost = SETUP.cost(TRUE)
    return [
        Sample(
            batch=batch,
            seconds=cost.cost(batch).seconds * factor(batch) * math.exp(chance.gauss(0, noise)),
        )
        for batch in BATCHES
    ]


def test_constants_are_recovered_from_steps_they_made() -> None:
    found = fit([(SETUP, measured())], TYPICAL, source="test", weight=0.001)
    assert found.constants.gemm_efficiency == pytest.approx(0.62, rel=0.05)
    assert found.constants.kv_efficiency == pytest.approx(0.7, rel=0.05)
    assert found.prefill is not None
    assert found.prefill.p95 < 0.01
    assert found.constants.source == "test"


def test_timings_of_single_prompts_and_of_batches_are_enough_to_fit() -> None:
    cost = SETUP.cost(TRUE)
    prompts, batches = (64, 256, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 32, 128)
    timed = samples_from_timings(
        [(n, cost.prefill_one(n).seconds) for n in prompts],
        [(n, n * 1500, cost.decode(n, n * 1500).seconds) for n in batches],
    )
    found = fit([(SETUP, timed)], TYPICAL, source="test")
    assert SETUP.cost(found.constants).decode(16, 24_000).seconds == pytest.approx(
        cost.decode(16, 24_000).seconds, rel=0.02
    )
    assert found.prefill is not None
    assert found.prefill.count == 6


def test_noise_of_two_per_cent_leaves_errors_of_about_that() -> None:
    found = fit([(SETUP, measured(0.02))], TYPICAL, source="test")
    assert found.decode is not None
    assert found.decode.mean < 0.03


def test_constants_that_steps_say_nothing_about_stay_as_they_were() -> None:
    decode_only = [s for s in measured() if s.batch.phase is Phase.DECODE]
    found = fit([(SETUP, decode_only)], TYPICAL, source="test")
    assert found.prefill is None
    assert found.constants.attention_efficiency == pytest.approx(TYPICAL.attention_efficiency)
    assert found.constants.prefill_layer_us == pytest.approx(TYPICAL.prefill_layer_us)


def test_one_fit_explains_several_setups() -> None:
    other = replace(SETUP, parallel=Parallel(tp=2))
    cost = other.cost(TRUE)
    sharded = [Sample(batch=batch, seconds=cost.cost(batch).seconds) for batch in BATCHES]
    found = fit([(SETUP, measured()), (other, sharded)], TYPICAL, source="test")
    assert found.decode is not None
    assert found.decode.count == 24
    assert found.decode.mean < 0.02


def test_a_fit_stays_where_machines_are() -> None:
    slow = fit([(SETUP, measured(factor=lambda _: 20.0))], TYPICAL, source="test").constants
    for name in NUMBERS:
        low, high = BOUNDS[name]
        assert low * 0.999 <= getattr(slow, name) <= high * 1.001


def test_the_same_steps_give_the_same_constants() -> None:
    once = fit([(SETUP, measured(0.05))], TYPICAL, source="test")
    assert fit([(SETUP, measured(0.05))], TYPICAL, source="test") == once


def test_each_half_predicts_the_other() -> None:
    errors = held_out(SETUP, measured(0.02), TYPICAL)
    assert set(errors) == set(Phase)
    assert errors[Phase.DECODE].count == 12
    assert errors[Phase.DECODE].mean < 0.08


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([], "no samples"),
        (measured()[:5], "5 prefill samples are too few"),
        ([replace(measured()[0], seconds=0.0), *measured()], "no time"),
        ([replace(measured()[0], seconds=math.nan), *measured()], "no time"),
        ([measured()[0]] * 8, "1 different loads"),
        (measured(factor=lambda b: 5000 / (b.new_tokens**2)), "misses half of the"),
        (measured(factor=lambda _: 1e-6), "misses half of the"),
    ],
)
def test_measurements_that_make_no_sense_are_refused(samples: list[Sample], reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        fit([(SETUP, samples)], TYPICAL, source="test")


def test_least_squares_stops_at_a_bound_and_can_leave_it() -> None:
    def residuals(x: list[float]) -> list[float]:
        return [x[0] - 3.0, x[0] + x[1] - 4.0]

    assert least_squares(residuals, [0.0, 0.0], [(-1.0, 2.0), (-9.0, 9.0)]) == pytest.approx(
        [2.0, 2.0], abs=1e-3
    )
    assert least_squares(residuals, [9.0, 9.0], [(-9.0, 9.0), (-9.0, 9.0)]) == pytest.approx(
        [3.0, 1.0], abs=1e-3
    )


def test_equations_are_solved_whatever_their_order() -> None:
    assert solve([[0.0, 2.0], [3.0, 1.0]], [4.0, 5.0], 0.0) == pytest.approx([1.0, 2.0])


def test_percentiles_lie_between_the_points() -> None:
    found = summarise([0.4, 0.0, 0.1, 0.2, 0.3])
    assert found is not None
    assert (found.median, found.p95) == pytest.approx((0.2, 0.38))
    assert summarise([]) is None


def moments(batches: list[int], time_us: Callable[[int], float]) -> DecodeMoments:
    return DecodeMoments(
        steps=len(batches),
        batch=sum(batches),
        time_us=sum(map(time_us, batches)),
        batch_squared=sum(b * b for b in batches),
        batch_time_us=sum(b * time_us(b) for b in batches),
        generated=sum(batches),
    )


def test_the_line_through_decode_steps_comes_back_from_their_moments() -> None:
    before = moments([5] * 9, lambda _: 77.0)
    window = moments([1, 2, 4, 8, 16], lambda b: 7000 + 50 * b)
    after = DecodeMoments(
        steps=14,
        batch=before.batch + window.batch,
        time_us=before.time_us + window.time_us,
        batch_squared=before.batch_squared + window.batch_squared,
        batch_time_us=before.batch_time_us + window.batch_time_us,
        generated=before.generated + window.generated,
    )
    assert line_from_moments(after.since(before)) == pytest.approx((7000e-6, 50e-6))


def test_the_mean_step_of_a_window_is_a_sample() -> None:
    found = sample_from_moments(moments([4, 8], lambda b: 1000.0 * b), 500.0)
    assert found.batch == decode_batch(6, 3000)
    assert found.seconds == pytest.approx(0.006)


@pytest.mark.parametrize(
    ("window", "reason"),
    [
        (moments([8] * 50, lambda _: 9000.0), "hardly varied"),
        (moments([1, 2, 4, 8], lambda b: 9000.0 - 500 * b), "make no sense"),
        (moments([1, 2, 4, 8], lambda b: -100 + 500.0 * b), "make no sense"),
    ],
)
def test_moments_without_a_sensible_line_are_refused(window: DecodeMoments, reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        line_from_moments(window)


def test_a_restarted_server_and_an_idle_one_give_no_sample() -> None:
    old, new = moments([1, 2, 3], lambda _: 10.0), moments([1], lambda _: 10.0)
    with pytest.raises(CalibrationError, match="restarted"):
        new.since(old)
    with pytest.raises(CalibrationError, match="no mean step"):
        sample_from_moments(old.since(old), 100.0)


def test_shipped_priors_lie_inside_their_bounds() -> None:
    assert all(BOUNDS[n][0] <= getattr(TYPICAL, n) <= BOUNDS[n][1] for n in NUMBERS)
    assert isinstance(TYPICAL, Constants)
