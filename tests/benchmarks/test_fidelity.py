"""The simulator against the gateway over HTTP, where the machine takes no time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from benchmarks.fidelity import (
    PERCENT,
    POINTS,
    SCENARIO,
    Player,
    compare,
    gateway_config,
    specs_of,
)
from benchmarks.report import Report
from gateway.config import Classes, Online, Timeouts
from gateway.simulation.figures import Figures, figures_of
from gateway.simulation.plan import Plan, load
from gateway.simulation.records import RunFacts
from gateway.simulation.runs import cases_of, run_case
from tests.gateway.gateway_under_test import standing

SECONDS = 60.0


def shorter() -> Plan:
    plan = load(SCENARIO)
    return replace(plan, scenario=replace(plan.scenario, duration_s=SECONDS, warm_up_s=5.0))


async def over_http(plan: Plan, facts: RunFacts) -> Figures:
    entry = plan.scenario.workload[0]
    online = Online(ttft_ms=entry.ttft_ms, tpot_ms=entry.tpot_ms, patience=entry.patience)
    patient = Timeouts(first_token_online_s=60.0)
    classes = Classes(online=online)
    async with standing(specs_of(plan, 1), classes=classes, timeouts=patient) as site:
        player = Player(plan, 1, site.url, asyncio.get_running_loop().time)
        await player.play(SECONDS * 2)
    return figures_of(facts, player.records)[0]


async def test_the_simulator_and_the_gateway_over_http_agree() -> None:
    plan = shorter()
    outcome, _ = run_case(plan, cases_of(plan)[0], with_records=False)
    report = Report(title="fidelity")
    real = await over_http(plan, outcome.facts)
    compare(report, 1, outcome.figures[0], real, check=True)
    assert real.submitted == outcome.figures[0].submitted > 100
    assert [check.as_dict() for check in report.checks if not check.ok] == []


def test_what_differs_is_missed() -> None:
    plan = shorter()
    outcome, _ = run_case(plan, cases_of(plan)[0], with_records=False)
    ours = outcome.figures[0]
    worse = replace(
        ours,
        attained=(ours.attained or 0) - POINTS / 90,
        ttft_ms=replace(ours.ttft_ms, p50=(ours.ttft_ms.p50 or 0) * (1 + PERCENT / 80)),
    )
    report = Report(title="fidelity")
    compare(report, 1, ours, worse, check=True)
    assert [check.ok for check in report.checks] == [True, True, False, False, True]
    assert json.loads(report.as_json(date="today"))["checks"][2]["ok"] is False


def test_the_gateways_configuration_has_the_targets_of_the_workload() -> None:
    text = gateway_config(1234, shorter().scenario.workload[0], "[[worker]]\n")
    assert "port = 1234" in text
    assert "ttft_ms = 1000.0" in text
