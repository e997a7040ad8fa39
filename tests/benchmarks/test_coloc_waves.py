from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from backends.workload import read_trace
from benchmarks import coloc_waves
from benchmarks.coloc_live import QUICK_LIVE, SEED, Pair, config_of, table_of
from benchmarks.coloc_live import checks_of as live_checks_of
from benchmarks.coloc_shape import (
    ALONE,
    ANSWER_TOKENS,
    HIGH_PER_S,
    OURS,
    Shape,
    Waved,
    figures,
    fleet,
    scenario,
    told,
    write_waves,
)
from benchmarks.coloc_waves import checks_of
from benchmarks.fidelity import Player, specs_of
from gateway.config import Timeouts, load
from gateway.scenario import PolicyEntry
from gateway.simulation.plan import Plan, planned
from gateway.simulation.records import Ended
from policies.types import Kind
from tests.benchmarks.test_coloc import record
from tests.gateway.gateway_under_test import standing


def test_waves_alternate_between_the_two_rates() -> None:
    shape = Shape()
    times = shape.waves(Random(1))
    high = [at for at in times if int(at // shape.phase_s) % 2 == 0]
    assert len(high) == pytest.approx(3 * 90 * HIGH_PER_S, rel=0.1)
    assert len(times) - len(high) == pytest.approx(3 * 90, rel=0.3)


def test_slower_servers_get_the_same_waves_in_their_own_time() -> None:
    slow = Shape(speed=0.25, phase_s=360.0)
    assert len(slow.waves(Random(1))) == pytest.approx(len(Shape().waves(Random(1))), rel=0.05)
    assert slow.tpot_ms == 4 * Shape().tpot_ms


def test_waves_are_a_trace_that_the_simulator_reads(tmp_path: Path) -> None:
    path = tmp_path / "waves.csv"
    write_waves(path, Shape(cycles=1).waves(Random(1)))
    rows = read_trace(path).rows
    assert {it.output_tokens for it in rows} == {ANSWER_TOKENS}
    assert rows[-1].arrival_s < 2 * 90


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


@pytest.mark.parametrize(("pace_ms", "code"), [(11.0, 0), (13.0, 1)])
def test_it_ends_with_one_object_and_exits_with_1_where_a_check_falls_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pace_ms: float, code: int
) -> None:
    def run(policy: PolicyEntry, *given: object, batch: bool) -> Waved:
        return waved(20.0, pace_ms if batch else 10.0)

    monkeypatch.setattr(coloc_waves, "run", run)
    monkeypatch.setattr(coloc_waves, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["coloc_waves", "--json", "--quick"])
    assert coloc_waves.main() == code
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"checks", "spread", "machine", "date"} <= set(told)
    assert [it["ok"] for it in told["checks"]] == [True, code == 0, True]


def test_what_did_not_end_is_not_done() -> None:
    batch = [
        record("b1", Kind.OFFLINE),
        record("b2", Kind.OFFLINE, ended=Ended.UNFINISHED, last_us=None),
    ]
    found = figures([record("a", Kind.ONLINE), *batch], Shape())
    assert found.done == 0.5
    assert found.ttft_p95_ms == 500.0


SHORT = replace(QUICK_LIVE, phase_s=4.0, rows=4)


def short_plan(folder: Path) -> Plan:
    trace = folder / "waves.csv"
    write_waves(trace, SHORT.waves(Random(1)))
    return planned(scenario(OURS, str(trace), SHORT, batch=True), folder)


async def test_both_classes_are_played_through_the_gateway(tmp_path: Path) -> None:
    plan = short_plan(tmp_path)
    policy = plan.scenario.policy[0]
    sections: dict[str, Any] = {
        "classes": policy.classes,
        "cost": policy.cost,
        "policies": policy.policies,
    }
    patient = Timeouts(first_token_online_s=60.0)
    async with standing(specs_of(plan, SEED), timeouts=patient, **sections) as site:
        player = Player(plan, SEED, site.url, asyncio.get_running_loop().time)
        await player.play(120.0)
        async with site.http.get(f"{site.url}/metrics") as answer:
            metrics = await answer.text()
    found = figures(player.records, SHORT)
    assert found.done == 1.0
    assert sum(it.kind is Kind.OFFLINE for it in player.records) == 3 * SHORT.rows
    assert 'class="offline"' in metrics


def test_the_gateway_of_the_live_waves_is_told_what_the_simulated_one_is(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    policy = told(OURS, SHORT)
    path.write_text(config_of(1234, policy, '[[worker]]\nurl = "http://127.0.0.1:1"\n'))
    config = load(path)
    assert (config.classes, config.cost) == (policy.classes, policy.cost)
    assert (config.policies, config.server.port) == (policy.policies, 1234)


def test_what_was_played_is_judged_beside_what_was_played_without_the_batch() -> None:
    alone = Pair(simulated=waved(20.0, 10.0), played=waved(30.0, 10.0), late_ms=1.0)
    ours = Pair(simulated=waved(90.0, 90.0), played=waved(32.0, 11.0), late_ms=30.0)
    checks = live_checks_of(alone, ours, (10.0, 20.0))
    assert [it.ok for it in checks] == [True, True, True, False]
    assert table_of([("alone", alone), ("ours", ours)]).row_count == 4


def test_the_servers_of_the_live_waves_are_slower(tmp_path: Path) -> None:
    assert {it.speed for it in fleet(SHORT).server} == {SHORT.speed}
    assert {it.speed for it in specs_of(short_plan(tmp_path), SEED)} == {SHORT.speed}
