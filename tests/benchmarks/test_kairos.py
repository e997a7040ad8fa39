"""What the Kairos benchmark promises, on a small scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from backends.steptimes import FittedStepTimes
from backends.workload import read_trace
from benchmarks.kairos import CURVE, LAW, Bench, Task, measured, spread_of
from benchmarks.kairos_systems import BASELINE, PLACED, RESCUED, SYSTEMS, System, long_tail
from benchmarks.kairos_trace import (
    DECODE_S,
    DECODE_TOKEN_S,
    PREFILL_PAIR_S,
    PREFILL_TOKEN_S,
    REQUESTS,
    first_tokens_s,
    quantiles,
    rows_of,
    tpots_s,
    write_trace,
)

TAIL = long_tail("long tail", replace(LAW, answer_mean=2.0), straggler=True, rates=CURVE)
FITTED = FittedStepTimes(
    prefill_token_s=PREFILL_TOKEN_S,
    prefill_pair_s=PREFILL_PAIR_S,
    decode_base_s=DECODE_S,
    decode_context_token_s=DECODE_TOKEN_S,
    decode_experts_s=LAW.experts_s,
)


def test_seeds_shuffle_one_set_of_lengths() -> None:
    one, other = rows_of(LAW, 1), rows_of(LAW, 2)
    assert sorted(row.prompt for row in one) == sorted(row.prompt for row in other)
    assert [row.prompt for row in one] != [row.prompt for row in other]


def test_the_tail_is_long_and_arrivals_come_at_the_rate_that_is_named() -> None:
    rows = rows_of(LAW, 1)
    assert max(row.prompt for row in rows) == 126_000
    assert sum(row.gap for row in rows) == pytest.approx(REQUESTS)
    assert fmean(quantiles(1_000, 0.6, 10**6)) == pytest.approx(1_000, rel=0.01)


def test_a_written_trace_is_one_that_the_simulator_reads(tmp_path: Path) -> None:
    write_trace(rows_of(LAW, 1), tmp_path / "trace.csv")
    assert len(read_trace(tmp_path / "trace.csv").rows) == REQUESTS


def test_the_fits_give_what_the_paper_measured() -> None:
    """8.8 s and 400.4 ms for prompts of 128 K and 8 K; steps of 40.3 and 11.0 ms."""
    assert FITTED.prefill_s([(131_072, 0)]) == pytest.approx(8.8, rel=0.01)
    assert FITTED.prefill_s([(8_192, 0)]) == pytest.approx(0.4004, rel=0.01)
    assert FITTED.decode_s(1, 131_072) == pytest.approx(0.0403, rel=0.01)
    assert FITTED.decode_s(1, 8_192) == pytest.approx(0.0110, rel=0.01)


def test_chunks_add_up_to_the_whole_prompt() -> None:
    whole = FITTED.prefill_s([(20_000, 0)])
    parts = sum(FITTED.prefill_s([(5_000, start)]) for start in range(0, 20_000, 5_000))
    assert parts == pytest.approx(whole)


def test_the_recursions_of_the_search_are_those_of_a_queue_and_a_batch() -> None:
    rows = rows_of(LAW, 1)[:3]
    arrivals, firsts = first_tokens_s(rows, 1000.0)
    assert firsts == sorted(firsts)
    assert firsts[0] - arrivals[0] == pytest.approx(FITTED.prefill_s([(rows[0].prompt, 0)]))
    alone = tpots_s(rows[:1], firsts, LAW.experts_s)[0]
    assert alone == pytest.approx(
        FITTED.decode_s(1, rows[0].prompt + rows[0].answer // 2), rel=0.01
    )


def test_every_system_runs_on_the_same_requests_and_ends_them_all(tmp_path: Path) -> None:
    names = {BASELINE, RESCUED, "SGLang hrrn", "FCFS, unified servers"}
    short = replace(TAIL, duration_s=20.0)
    for system in (it for it in SYSTEMS if it.name in names):
        found = measured(Task(short, system, 2.0, 1), tmp_path)
        assert found.ttft > 20
        assert found.worst_ttft_s < 1e3


def test_names_are_distinct_and_the_baseline_is_first() -> None:
    for systems in (SYSTEMS, PLACED):
        names = [it.name for it in systems]
        assert len(set(names)) == len(names)
        assert names[0] == BASELINE


def test_quick_runs_a_few_systems(tmp_path: Path) -> None:
    bench = Bench(tmp_path, quick=True, processes=1)
    assert len(bench.systems) == 3
    assert isinstance(bench.systems[0], System)


def test_a_spread_shows_mean_least_and_most() -> None:
    assert spread_of([80.0, 90.0, 85.0]) == "85.0 (80-90)"
