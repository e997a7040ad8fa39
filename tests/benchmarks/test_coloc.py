from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backends.steptimes import LinearStepTimes
from benchmarks import coloc, coloc_sweep
from benchmarks.coloc import Found, checks_of, rows_of
from benchmarks.coloc_budget import fitted
from benchmarks.coloc_sweep import (
    Curve,
    Ground,
    Point,
    Task,
    case_of,
    curve,
    has_missed,
    measured,
    planned_for,
    point,
)
from benchmarks.coloc_systems import (
    ABLATIONS,
    ARXIV,
    BESIDE,
    DECODES,
    OURS,
    PEERS,
    PREFILLS,
    TRAFFIC,
    System,
    Traffic,
    fleets,
)
from benchmarks.fluid import Bound
from gateway.scenario import WorkloadEntry
from gateway.simulation.records import Ended, Record, RunFacts
from policies.types import Kind, Role

LOADS = tuple(k / 10 for k in range(1, 11))


def at(load: float, violations: float, tokens: float | None = None) -> Point:
    return Point(
        load=load,
        offered_per_s=load,
        violations=violations,
        ttft_violations=violations,
        tpot_violations=0.0,
        tokens_per_s=load * 100 if tokens is None else tokens,
        requests_per_s=load,
        wasted=0.01,
    )


def searched(monkeypatch: pytest.MonkeyPatch, kept_to: float, also: float = 0.0) -> Curve:
    def point(task: Task, plan: object, load: float) -> Point:
        keeps = load <= kept_to + 1e-9 or abs(load - also) < 1e-9
        return at(load, 0.0 if keeps else 0.5)

    monkeypatch.setattr(coloc_sweep, "point", point)
    monkeypatch.setattr(coloc_sweep, "planned_for", lambda _: None)
    return curve(task_of(TRAFFIC[0]))


def task_of(traffic: Traffic, system: System = OURS, **more: object) -> Task:
    task = Task(
        traffic=traffic,
        system=system,
        seed=1,
        unit_per_s=10.0,
        alone=0.0,
        counted=100,
        loads=LOADS,
        data=Path(),
    )
    return replace(task, **more)  # type: ignore[arg-type]  # a test's own words


@pytest.mark.parametrize("kept_to", [0.0, 0.1, 0.4, 0.7, 0.9, 1.0])
def test_the_search_finds_the_largest_load_that_is_kept(
    monkeypatch: pytest.MonkeyPatch, kept_to: float
) -> None:
    found = searched(monkeypatch, kept_to)
    best = found.most(found.stricter_limit)
    assert (best.load if best else 0.0) == pytest.approx(kept_to)
    assert len(found.points) <= 6


def test_one_load_that_fails_by_chance_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = searched(monkeypatch, 0.4, also=0.6)
    best = found.most(found.stricter_limit)
    assert best is not None
    assert best.load == pytest.approx(0.6)


def record(name: str, kind: Kind, **more: object) -> Record:
    base = Record(
        id=name,
        workload=str(kind),
        kind=kind,
        arrival_us=0,
        prompt_tokens=100,
        output_tokens=11,
        ttft_target_us=1_000_000,
        tpot_target_us=50_000,
        window_us=10**12,
        ended=Ended.FINISHED,
        first_us=500_000,
        last_us=800_000,
        generated=11,
        computed_tokens=100,
    )
    for key, value in more.items():
        setattr(base, key, value)
    return base


FACTS = RunFacts(
    policy="any",
    load=1.0,
    seed=1,
    from_us=0,
    until_us=2_000_000,
    ended_us=3_000_000,
    gpu_s=1.0,
    requests=4,
)


def test_only_what_offline_requests_got_while_online_ones_came_counts() -> None:
    batch = [
        record("b1", Kind.OFFLINE),
        record("b2", Kind.OFFLINE, first_us=1_500_000, last_us=2_500_000, generated=20),
        record("b3", Kind.OFFLINE, ended=Ended.UNFINISHED, first_us=None, last_us=None),
    ]
    found = measured(FACTS, [record("a", Kind.ONLINE), *batch], 1.0, 5.0)
    assert found.tokens_per_s == pytest.approx((11 + 10) / 2)
    assert found.requests_per_s == pytest.approx(0.5)


def test_violations_are_of_all_online_requests_and_waste_of_all_offline_tokens() -> None:
    late = record("late", Kind.ONLINE, first_us=1_200_000, last_us=1_300_000)
    refused = record("refused", Kind.ONLINE, ended=Ended.REJECTED, first_us=None)
    again = record("b", Kind.OFFLINE, computed_tokens=150)
    online = [record("a", Kind.ONLINE), record("c", Kind.ONLINE), late, refused]
    found = measured(FACTS, [*online, again], 1.0, 5.0)
    assert found.violations == pytest.approx(0.5)
    assert found.wasted == pytest.approx(50 / 111)


CHAT = WorkloadEntry(
    name="chat", rate=4.0, input_median=400.0, output_median=100.0, ttft_ms=5000.0, tpot_ms=24.0
)
SHORT = replace(TRAFFIC[2], online=(CHAT,), warm_up_s=5.0, duration_s=25.0)


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    """Long enough prompts that a hundred of them a second are too many for anybody."""
    path = tmp_path / ARXIV
    path.parent.mkdir()
    with gzip.open(path, "wt") as lines:
        lines.write("input_tokens,output_tokens\n" + "3000,200\n" * 50)
    return tmp_path


def test_a_run_that_is_lost_ends_at_once_and_says_as_much(lengths: Path) -> None:
    task = task_of(SHORT, PEERS[0], unit_per_s=100.0, counted=80, data=lengths)
    found = point(task, planned_for(task), 1.0)
    assert max(task.limits) < found.violations < 0.5
    assert found.tokens_per_s == 0.0


def test_a_run_that_may_still_be_kept_goes_to_its_end(lengths: Path) -> None:
    task = task_of(SHORT, PEERS[1], unit_per_s=1.0, counted=80, data=lengths)
    found = point(task, planned_for(task), 0.5)
    assert found.violations == 0.0
    assert 50 < found.tokens_per_s < 150
    assert found.offered_per_s == 0.5


def test_a_budget_is_searched_under_a_backlog() -> None:
    task = task_of(SHORT, BESIDE[0], loads=(0.1, 1.2))
    case = case_of(task, BESIDE[0].policy, 0.75)
    assert case.load == 1.2
    assert case.policy.budget.ms == pytest.approx(0.75 * SHORT.tpot_ms)


def test_a_larger_budget_lets_more_offline_work_in(lengths: Path) -> None:
    task = task_of(SHORT, BESIDE[1], unit_per_s=10.0, counted=80, data=lengths)
    plan = planned_for(task)
    served = [point(task, plan, budget).tokens_per_s for budget in (0.3, 0.6, 0.9)]
    assert served[0] == 0.0
    assert 0.0 < served[1] < served[2]


def test_the_predictor_follows_the_step_times() -> None:
    times = LinearStepTimes()
    found = fitted(times, stalls=True)
    assert found.step_s(32, 32 * 2000) == pytest.approx(times.decode_s(32, 64_000), rel=0.05)
    assert found.prompt_token_us == pytest.approx(times.prefill_s([(2048, 0)]) / 2048e-6, rel=0.1)
    assert fitted(times, stalls=False).prompt_token_us == 0.0


def test_only_what_is_certain_counts_as_missed_before_the_end() -> None:
    waiting = record("a", Kind.ONLINE, ended=Ended.UNFINISHED, first_us=None, last_us=None)
    assert not has_missed(waiting, 1_000_000)
    assert has_missed(waiting, 1_000_001)
    running = record("b", Kind.ONLINE, ended=Ended.UNFINISHED)
    assert not has_missed(running, 10**9)
    slow = record("c", Kind.ONLINE, last_us=1_500_000)
    assert has_missed(slow, 1_500_000)


def found_with(**best: float) -> Found:
    """One seed; each system keeps everything up to its load."""
    bound = Bound(tokens_per_s=100.0, requests_per_s=1.0)
    ground = Ground(
        traffic="c",
        seed=1,
        alone=at(0.0, 0.0),
        online=100,
        counted=90,
        bounds={0.005: bound, 0.03: bound},
        median_tpot_ms=10.0,
        source="somewhere",
    )
    found = Found(next(it for it in TRAFFIC if it.key == "c"), {1: ground})
    for system in (*PEERS, *BESIDE, OURS, *ABLATIONS):
        load = best.get(system.key, 0.1)
        points = (at(load, 0.0), at(1.2, 0.5))
        found.add(Curve(traffic="c", system=system.key, seed=1, alone=0.0, points=points))
    return found


def test_ours_is_judged_by_the_best_of_the_others() -> None:
    checks = {it.name: it for it in checks_of(found_with(ours=0.9, v1=0.3, AIMD=0.2))}
    gain = checks["(c) offline tokens/s beside the best baseline, stricter score"]
    assert gain.value == pytest.approx(3.0)
    assert gain.ok
    assert all(it.ok for it in checks.values())
    worse = checks_of(found_with(ours=0.2, v1=0.3))
    assert not any(it.ok for it in worse if "beside" in it.name)


@pytest.mark.parametrize(("best", "code"), [(0.9, 0), (0.2, 1)])
def test_it_ends_with_one_object_and_exits_with_1_where_a_check_falls_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], best: float, code: int
) -> None:
    monkeypatch.setattr(coloc, "run", lambda asked, tick: [found_with(ours=best, v1=0.3)])
    monkeypatch.setattr(sys, "argv", ["coloc", "--json", "--only", "c"])
    assert coloc.main() == code
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"checks", "spread", "machine", "date"} <= set(told)
    assert all(it["ok"] for it in told["checks"]) is (code == 0)


def test_the_table_has_a_row_for_each_system_and_one_for_the_bound() -> None:
    systems = [*PEERS, OURS]
    assert rows_of(found_with(), systems).row_count == len(systems) + 1


@pytest.mark.parametrize("strict", [0, 1, 2])
def test_every_fleet_has_the_same_servers(strict: int) -> None:
    for fleet in fleets(strict):
        counts = dict.fromkeys(Role, 0)
        for server in fleet.server:
            counts[server.role] += server.count
        assert sum(counts.values()) == PREFILLS + DECODES
        if not counts[Role.UNIFIED]:
            assert (counts[Role.PREFILL], counts[Role.DECODE]) == (PREFILLS, DECODES)
        assert {(it.device, it.model, it.kv_tokens, it.speed) for it in fleet.server} == {
            ("", "", 0, 1.0)
        }
