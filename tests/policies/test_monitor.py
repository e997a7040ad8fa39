from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.monitor import BURSTIEST, Monitor
from policies.types import Kind

ONLINE, OFFLINE = Kind.ONLINE, Kind.OFFLINE
S = 1_000_000
Arrivals = st.lists(st.tuples(st.integers(0, 50 * S), st.integers(1, 4000)), max_size=60)


def fed(arrivals: list[tuple[int, int]], kind: Kind = ONLINE, window_s: float = 60.0) -> Monitor:
    monitor = Monitor(0, window_s=window_s)
    for at_us, tokens in sorted(arrivals):
        monitor.arrived(kind, tokens, 0, at_us)
    return monitor


@given(Arrivals)
def test_inside_the_window_every_arrival_counts_once(arrivals: list[tuple[int, int]]) -> None:
    found = fed(arrivals).flow(ONLINE, 59 * S, rate_us=60 * S, lengths_us=60 * S)
    lengths = [tokens for _, tokens in arrivals]
    assert found.rate_per_s == pytest.approx(len(lengths) / 59)
    if lengths:
        mean = sum(lengths) / len(lengths)
        spread = sum((n - mean) ** 2 for n in lengths) / len(lengths)
        assert found.prompt.mean == pytest.approx(mean)
        assert found.prompt.variance == pytest.approx(spread, abs=1e-3)


def test_what_is_older_than_the_span_is_forgotten() -> None:
    monitor = fed([(1 * S, 100), (58 * S, 300)])
    found = monitor.flow(ONLINE, 59 * S, rate_us=10 * S, lengths_us=60 * S)
    assert found.rate_per_s == pytest.approx(1 / 9)
    assert found.prompt.mean == 200.0


def test_a_long_silence_empties_the_window() -> None:
    monitor = fed([(at * S, 100) for at in range(60)])
    found = monitor.flow(ONLINE, 3600 * S, rate_us=60 * S, lengths_us=60 * S)
    assert (found.rate_per_s, found.prompt.mean) == (0.0, 0.0)
    assert monitor.idle_us(3600 * S) == 3541 * S


def test_classes_are_kept_apart() -> None:
    monitor = fed([(S, 100)])
    monitor.arrived(OFFLINE, 9000, 0, 2 * S)
    spans = {"rate_us": 10 * S, "lengths_us": 10 * S}
    assert monitor.flow(ONLINE, 3 * S, **spans).prompt.mean == 100.0
    assert monitor.flow(OFFLINE, 3 * S, **spans).prompt.mean == 9000.0


def test_what_caches_hold_is_a_share_of_the_tokens() -> None:
    monitor = Monitor(0)
    monitor.arrived(ONLINE, 300, 200, S)
    monitor.arrived(ONLINE, 100, 500, S)
    found = monitor.flow(ONLINE, 2 * S, rate_us=10 * S, lengths_us=10 * S)
    assert found.cached_share == pytest.approx(300 / 400)


@pytest.mark.parametrize(("shape", "low", "high"), [(1.0, 0.8, 1.25), (0.25, 3.0, 5.0)])
def test_burstiness_is_that_of_the_gaps(shape: float, low: float, high: float) -> None:
    random, now_us, arrivals = Random(1), 0, []
    while now_us < 290 * S:
        now_us += round(random.gammavariate(shape, 0.1 / shape) * S)
        arrivals.append((now_us, 10))
    found = fed(arrivals, window_s=300).flow(ONLINE, 299 * S, rate_us=S, lengths_us=300 * S)
    assert low < found.burstiness < high


def test_few_gaps_say_nothing_of_bursts_and_strange_ones_are_bounded() -> None:
    few = fed([(0, 1), (1, 1), (50 * S, 1)])
    odd = fed([*((at, 1) for at in range(4000)), (50 * S, 1)])
    span = {"rate_us": 60 * S, "lengths_us": 60 * S}
    assert few.flow(ONLINE, 51 * S, **span).burstiness == 1.0
    assert odd.flow(ONLINE, 51 * S, **span).burstiness == BURSTIEST


@given(st.lists(st.integers(0, 10_000 * S), max_size=80))
def test_memory_does_not_grow_and_no_time_breaks_it(times: list[int]) -> None:
    monitor = fed([(at, 10) for at in times], window_s=20.0)
    last_us = max(times, default=0)
    found = monitor.flow(ONLINE, last_us, rate_us=10_000 * S, lengths_us=20 * S)
    assert monitor.window_us == 20 * S
    assert 0 <= found.rate_per_s < float("inf")
