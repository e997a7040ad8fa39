from __future__ import annotations

import gzip
from pathlib import Path
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.steptimes import FittedStepTimes, LinearStepTimes, Noisy, Row, Table, read_table

PREFILL = [Row(1, 100, 0.01), Row(1, 200, 0.03), Row(2, 100, 0.02)]
DECODE = [Row(1, 100, 0.01), Row(1, 300, 0.02), Row(3, 100, 0.03), Row(3, 300, 0.06)]


@pytest.mark.parametrize(
    ("batch", "context", "seconds"),
    [(1, 128, 6.6e-3), (32, 2048, 9.5e-3), (128, 2048, 18.3e-3), (256, 4096, 52.4e-3)],
)
def test_the_default_decode_times_resemble_the_table(
    batch: int, context: int, seconds: float
) -> None:
    assert LinearStepTimes().decode_s(batch, batch * context) == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize(("tokens", "ms"), [(128, 7.5), (1024, 22.8), (8192, 206), (32768, 1175)])
def test_the_default_prefill_times_resemble_the_table(tokens: int, ms: float) -> None:
    assert LinearStepTimes().prefill_s([(tokens, 0)]) * 1e3 == pytest.approx(ms, rel=0.03)


def test_chunks_cost_together_what_the_whole_prompt_costs() -> None:
    times = LinearStepTimes(prefill_floor_s=0.0, prefill_base_s=0.0)
    chunks = sum(times.prefill_s([(1000, done)]) for done in range(0, 4000, 1000))
    assert chunks == pytest.approx(times.prefill_s([(4000, 0)]))


def test_noise_keeps_the_mean_and_follows_its_seed() -> None:
    def draws(seed: int) -> list[float]:
        noisy = Noisy(LinearStepTimes(), Random(seed), sigma=0.1)
        return [noisy.decode_s(8, 1000) for _ in range(2000)]

    assert draws(1) == draws(1)
    assert fmean(draws(1)) == pytest.approx(LinearStepTimes().decode_s(8, 1000), rel=0.01)


def test_a_table_goes_through_its_points_and_is_linear_between_them() -> None:
    table = Table(PREFILL, DECODE)
    assert table.decode_s(3, 900) == pytest.approx(0.06)
    assert table.decode_s(2, 400) == pytest.approx((0.01 + 0.02 + 0.03 + 0.06) / 4)
    assert table.prefill_s([(150, 0)]) == pytest.approx(0.02)


def test_a_later_chunk_costs_what_the_longer_prompt_costs_more() -> None:
    steep = Table([Row(1, 100, 0.01), Row(1, 200, 0.05), Row(1, 300, 0.15)], DECODE)
    assert steep.prefill_s([(100, 200)]) == pytest.approx(0.10)


@given(st.integers(1, 10), st.integers(1, 10_000))
def test_a_longer_context_never_makes_a_step_shorter(batch: int, context: int) -> None:
    table = Table(PREFILL, DECODE)
    assert table.decode_s(batch, context + 100) >= table.decode_s(batch, context)


def test_a_table_is_read_from_a_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv.gz"
    with gzip.open(path, "wt") as out:
        out.write("system,model,tp,phase,batch_size,ctx_len,latency_ms\n")
        out.write("h100,m,1,prefill,1,128,7.5\nh100,m,1,decode,1,128,6.6\n")
        out.write("a100,m,1,decode,1,128,9.9\n")
    table = read_table(path, system="h100", model="m", tp=1)
    assert table.decode_s(1, 128) == pytest.approx(6.6e-3)
    with pytest.raises(ValueError, match="no steps of x"):
        read_table(path, system="h100", model="x", tp=1)


def test_prompts_of_one_pass_do_not_attend_to_each_other() -> None:
    """Seconds of a quadratic law: 1e-5 a token, 1e-9 a square of a prompt's tokens."""

    def seconds(*prompts: int) -> float:
        return 1e-5 * sum(prompts) + 1e-9 * sum(n * n for n in prompts)

    measured = [Row(1, n, seconds(n)) for n in range(1000, 9000, 1000)]
    measured += [Row(2, n, seconds(n, n)) for n in (1000, 2000, 4000)]
    table = Table(measured, DECODE)
    assert table.prefill_s([(1000, 0), (3000, 0)]) == pytest.approx(seconds(1000, 3000))
    assert table.prefill_s([(4000, 4000)]) == pytest.approx(seconds(8000) - seconds(4000))


@pytest.mark.parametrize("each", [1, 8, 16])
def test_fitted_steps_meet_every_expert_in_the_end(each: int) -> None:
    times = FittedStepTimes(
        prefill_token_s=0.0,
        prefill_pair_s=0.0,
        decode_base_s=0.01,
        decode_context_token_s=0.0,
        decode_experts_s=0.005,
        experts=8,
        experts_per_token=each,
    )
    assert times.decode_s(1, 0) == pytest.approx(0.01)
    assert times.decode_s(256, 0) == pytest.approx(0.015)
