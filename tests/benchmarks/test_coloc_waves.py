from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from backends.workload import read_trace
from benchmarks.coloc_waves import (
    ALONE,
    ANSWER_TOKENS,
    CYCLES,
    HIGH_PER_S,
    OURS,
    PHASE_S,
    Waved,
    checks_of,
    figures,
    waves,
    write_waves,
)
from gateway.simulation.records import Ended
from policies.types import Kind
from tests.benchmarks.test_coloc import record


def test_waves_alternate_between_the_two_rates() -> None:
    times = waves(CYCLES, Random(1))
    high = [at for at in times if int(at // PHASE_S) % 2 == 0]
    assert len(high) == pytest.approx(CYCLES * PHASE_S * HIGH_PER_S, rel=0.1)
    assert len(times) - len(high) == pytest.approx(CYCLES * PHASE_S, rel=0.3)


def test_waves_are_a_trace_that_the_simulator_reads(tmp_path: Path) -> None:
    path = tmp_path / "waves.csv"
    write_waves(path, waves(1, Random(1)))
    rows = read_trace(path).rows
    assert {it.output_tokens for it in rows} == {ANSWER_TOKENS}
    assert rows[-1].arrival_s < 2 * PHASE_S


def waved(ttft_ms: float, tpot_ms: float, done: float = 1.0) -> Waved:
    return Waved(ttft_p95_ms=ttft_ms, tpot_p95_ms=tpot_ms, done=done, last_s=1.0, wasted_tokens=0)


def test_the_worst_seed_counts() -> None:
    found = {
        ALONE.name: [waved(20.0, 10.0), waved(20.0, 10.0)],
        OURS.name: [waved(21.0, 11.0), waved(24.0, 11.0, done=0.9)],
    }
    checks = {it.name: it for it in checks_of(found)}
    assert checks["TTFT p95 above chat alone"].value == pytest.approx(20.0)
    assert checks["TPOT p95 above chat alone"].ok
    assert not checks["batch done"].ok


def test_what_did_not_end_is_not_done() -> None:
    batch = [
        record("b1", Kind.OFFLINE),
        record("b2", Kind.OFFLINE, ended=Ended.UNFINISHED, last_us=None),
    ]
    found = figures([record("a", Kind.ONLINE), *batch])
    assert found.done == 0.5
    assert found.ttft_p95_ms == 500.0
