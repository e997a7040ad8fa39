"""Traces and synthetic arrivals: what is read, what is refused, and which laws arrivals keep."""

from __future__ import annotations

import gzip
import statistics
from itertools import pairwise, takewhile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.workload import (
    Arrivals,
    Ask,
    Bursts,
    Diurnal,
    Empirical,
    Gamma,
    LogNormal,
    Poisson,
    WorkloadError,
    read_lengths,
    read_trace,
    replayed,
    synthetic,
)

HEADER = "timestamp,input_tokens,output_tokens"
LAWS: list[Arrivals] = [
    Poisson(rate=5.0),
    Gamma(rate=5.0, cv=3.0),
    Bursts(rate=5.0, factor=10.0, burst_s=5.0, calm_s=20.0),
    Diurnal(rate=5.0, peak_to_trough=5.0, day_s=500.0),
]


def written(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_trace_is_read_in_order_with_its_lines(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "0.0,10,5", "1.5,20,6"))
    assert trace.rows == (Ask(0.0, 10, 5, 0, 2), Ask(1.5, 20, 6, 0, 3))
    assert trace.skipped == ()


def test_a_gzipped_trace_with_cached_tokens_and_other_columns_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(f"{HEADER},cached_prefix_tokens,who\n0,10,5,4,x\n".encode()))
    assert read_trace(path).rows == (Ask(0.0, 10, 5, 4, 2),)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("-1,10,5", "negative"),
        ("1,10,5", "after 2"),
        ("3,0,5", "input_tokens '0' must be a whole number of at least 1"),
        ("3,10,0", "output_tokens '0'"),
        ("3,10.5,1", "whole number"),
        ("3,ten,1", "'ten' is not a number"),
        ("3,10", "too few fields: .*output_tokens"),
        ("nan,10,5", "finite"),
        (",10,5", "timestamp '' is not a number"),
    ],
)
def test_a_row_that_makes_no_request_is_refused_by_line_or_skipped(
    tmp_path: Path, line: str, why: str
) -> None:
    path = written(tmp_path, "2.0,10,5", line, "4.0,10,5")
    with pytest.raises(WorkloadError, match=rf"trace\.csv, line 3: .*{why}"):
        read_trace(path)
    trace = read_trace(path, skip_bad=True)
    assert [row.arrival_s for row in trace.rows] == [2.0, 4.0]
    assert [bad.line for bad in trace.skipped] == [3]


def test_more_cached_tokens_than_prompt_is_a_bad_row(tmp_path: Path) -> None:
    path = written(tmp_path, "0,10,5,11", header=f"{HEADER},cached_prefix_tokens")
    with pytest.raises(WorkloadError, match="11 is more than the prompt's 10"):
        read_trace(path)


def test_missing_columns_are_named_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, "1,2", header="timestamp,tokens")
    with pytest.raises(WorkloadError, match=r"line 1: .*input_tokens.*there are .*tokens"):
        read_trace(path, skip_bad=True)


@pytest.mark.parametrize("content", [b"", HEADER.encode(), b"\xff\xfe\x00", b"\x1f\x8b broken"])
def test_a_file_without_requests_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    with pytest.raises(WorkloadError):
        read_trace(path, skip_bad=True)


def test_a_broken_archive_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(HEADER.encode() * 100)[:40])
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_trace(path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = written(tmp_path, "0,10,5", header="\ufeff" + HEADER)
    assert [row.input_tokens for row in read_trace(path).rows] == [10]


def test_a_row_that_ends_early_says_so_by_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "0,10,5", "1,10")
    with pytest.raises(WorkloadError, match="line 3: too few fields: the row ends before output"):
        read_trace(path)


def test_lengths_need_no_times(tmp_path: Path) -> None:
    path = written(tmp_path, "10,5", "7,2", header="input_tokens,output_tokens")
    assert [row.input_tokens for row in read_lengths(path).rows] == [10, 7]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_arrivals_never_go_back_and_come_at_their_mean_rate(law: Arrivals) -> None:
    times = list(takewhile(lambda at: at < 5000, law.times(Random(1))))
    assert all(before <= after for before, after in pairwise(times))
    assert len(times) / 5000 == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_a_seed_gives_the_same_arrivals(law: Arrivals) -> None:
    lengths = Empirical([Ask(0, 10, 5), Ask(0, 20, 6)])
    first, second, other = (
        list(synthetic(law, lengths, until_s=50, random=Random(seed))) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_a_gamma_law_has_the_variation_that_it_names() -> None:
    times = list(takewhile(lambda at: at < 20_000, Gamma(rate=2.0, cv=2.5).times(Random(3))))
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(2.5, rel=0.1)


def test_bursts_are_burstier_than_poisson() -> None:
    def dispersion(law: Arrivals) -> float:
        counts = [0] * 2000
        for at in takewhile(lambda at: at < 2000, law.times(Random(5))):
            counts[int(at)] += 1
        return statistics.variance(counts) / statistics.mean(counts)

    assert dispersion(Poisson(rate=5.0)) == pytest.approx(1.0, abs=0.2)
    assert dispersion(Bursts(rate=5.0, factor=10.0)) > 3


def test_a_day_has_its_peak_in_the_middle() -> None:
    law = Diurnal(rate=5.0, peak_to_trough=9.0, day_s=1000.0)
    times = [at % 1000 for at in takewhile(lambda at: at < 10_000, law.times(Random(2)))]
    noon = sum(400 <= at < 600 for at in times)
    midnight = sum(at < 100 or at >= 900 for at in times)
    assert noon / midnight == pytest.approx(9, rel=0.35)


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(1, 20))
def test_log_normal_lengths_stay_inside(seed: int, input_max: int, output_max: int) -> None:
    law = LogNormal(
        input_median=20,
        input_sigma=2.0,
        input_max=input_max,
        output_median=5,
        output_sigma=2.0,
        output_max=output_max,
    )
    asked, answered, cached = law.draw(Random(seed))
    assert 1 <= asked <= input_max
    assert 1 <= answered <= output_max
    assert cached == 0


def test_a_replay_begins_where_it_is_told_and_goes_faster() -> None:
    rows = [Ask(float(i), 10, 5) for i in range(10)]
    moved = replayed(rows, from_s=4.0, until_s=2.0, rate_scale=2.0, random=Random(1))
    assert [row.arrival_s for row in moved] == [0.0, 0.5, 1.0, 1.5]


def test_times_told_in_ticks_are_spread_over_their_tick() -> None:
    rows = [Ask(3.0 * (i // 100), 10, 5) for i in range(300)]
    moved = replayed(rows, tick_s=3.0, random=Random(1))
    assert len({row.arrival_s for row in moved}) == 300
    assert [row.arrival_s for row in moved] == sorted(row.arrival_s for row in moved)
    assert sum(row.arrival_s < 3.0 for row in moved) == 100
