from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ratio import (
    LISTED,
    Held,
    Point,
    at_rate,
    closed_checks,
    demand,
    dynamic_checks,
    equal_check,
    goodput,
    held,
    mean,
)
from benchmarks.ratio_worlds import (
    GPUS,
    OURS,
    WORLDS,
    acting_policies,
    bursting,
    closed_plan,
    dynamic_plan,
    elastic,
    split,
    switching,
)
from gateway.settings import ConfigError
from gateway.simulation.figures import Figures, Quantiles
from gateway.simulation.runs import cases_of, run_case
from policies.types import Kind, Role

NOWHERE = Path("nowhere")


def quantiles(p90: float) -> Quantiles:
    return Quantiles(p50=p90 / 2, p90=p90, p99=p90)


def point(clients: float, rate: float, ttft_ms: float, tpot_ms: float) -> Point:
    figures = Figures(
        workload="closed",
        kind=Kind.ONLINE,
        submitted=100,
        finished=100,
        rejected=0,
        failed=0,
        unfinished=0,
        ttft_attained=1.0,
        tpot_attained=1.0,
        attained=1.0,
        ttft_ms=quantiles(ttft_ms),
        tpot_ms=quantiles(tpot_ms),
        goodput_per_s=rate,
        tokens_per_s=0.0,
        wasted_tokens=0,
        retries=0,
        gpu_s=1.0,
        parts_ms=(),
    )
    return Point(clients, rate, figures)


def test_goodput_is_the_highest_rate_at_which_both_targets_are_kept() -> None:
    curve = [
        point(8, 10, 50, 8),
        point(16, 20, 60, 11),
        point(32, 30, 60, 51),
        point(64, 31, 1600, 9),
    ]
    assert goodput(curve) == 20
    assert goodput([point(8, 10, 1600, 8)]) == 0.0
    assert at_rate(curve, 29.0).clients == 32
    assert at_rate(curve, 1.0).clients == 8
    assert at_rate(curve, 99.0).clients == 64


def test_the_checks_of_the_closed_loop_compare_at_the_same_rate() -> None:
    slow = [point(8, 10, 200, 10), point(16, 20, 2000, 100)]
    fast = [point(8, 10, 50, 5), point(16, 20, 100, 10)]
    found = dict.fromkeys(("unified", "DistServe-like", *LISTED), slow)
    found |= {"static 2P4D": fast, OURS: fast}
    checks = {check.name: check.value for check in closed_checks("x", found)}
    assert checks["x: goodput beside unified servers"] == 2.0
    assert checks["x: goodput beside 1P1D, 2P1D and 3P1D"] == 2.0
    assert checks["x: goodput beside the best of all static splits"] == 1.0
    assert checks["x: P90 TTFT beside DistServe-like at 20/s"] == pytest.approx(-95.0)
    assert checks["x: P90 TPOT beside DistServe-like at 20/s"] == pytest.approx(-90.0)


def run_of(attained: float, gpu_s: float) -> Held:
    return Held(attained=attained, by_phase=(), gpu_s=gpu_s, switched=0, launched=0, released=0)


def test_a_planner_that_fails_cheaply_is_shown_as_cheaper() -> None:
    found = {
        OURS: run_of(99.9, 1000.0),
        "dyn-load": run_of(80.0, 500.0),
        "dyn-sla": run_of(90.0, 1500.0),
        "dyn-sla, x2": run_of(99.5, 2000.0),
    }
    attained, above, load, sla = dynamic_checks("load", found)
    assert (attained.ok, above.ok, load.ok, sla.ok) == (True, True, False, True)
    others = {name: it for name, it in found.items() if name != OURS}
    equal = equal_check("load", found[OURS], others)
    assert (load.value, equal.value) == (2.0, 0.5)
    assert equal.name.endswith("dyn-sla, x2")


def test_several_seeds_are_shown_as_their_mean() -> None:
    both = mean([run_of(99.0, 1000.0), run_of(100.0, 2000.0)])
    assert (both.attained, both.gpu_s) == (99.5, 1500.0)


def test_every_system_of_the_closed_loop_has_the_same_gpus() -> None:
    for world in WORLDS:
        scenario = closed_plan(NOWHERE, world, (8,), 10.0, 1.0).scenario
        sizes = {sum(server.count for server in it.server) for it in scenario.fleet}
        assert len(sizes) == 1
    assert sum(server.count for server in elastic(5.0).server) == GPUS
    assert [server.role for server in split(1, 3).server] == [Role.PREFILL, Role.DECODE]


def test_a_shifting_load_is_served_and_paid_for_by_every_policy() -> None:
    sources = bursting(NOWHERE, 20.0, seed=3)
    plan = dynamic_plan(NOWHERE, sources, 60.0, (1,), acting_policies(5.0))
    [case] = [it for it in cases_of(plan) if it.policy.name == switching(OURS, 5.0)]
    quick = replace(case.policy, ratio=replace(case.policy.ratio, dwell_s=10.0, interval_s=5.0))
    found = held(run_case(plan, replace(case, policy=quick), with_records=False)[0])
    assert found.attained > 90.0
    assert found.gpu_s + found.released * 60.0 > 4 * 60.0
    assert found.gpu_s < GPUS * 90.0
    assert found.switched + found.launched + found.released > 0


def test_what_is_missing_is_told_of_before_anything_is_simulated() -> None:
    with pytest.raises(ConfigError, match=r"nowhere/.* is not there; say with --data"):
        demand(NOWHERE)
