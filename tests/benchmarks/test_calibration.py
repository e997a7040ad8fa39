from __future__ import annotations

import random

from backends.calibration_run import Facts, Findings, Step
from benchmarks.calibration import LOADS, Outcome, Subject, changes, fresh_plan, note, subjects
from benchmarks.report import Report
from policies.roofline import Phase
from policies.types import Role

FACTS = Facts(
    mode="null", model_path="m", accelerator="", tp=1, chunk_tokens=2048, context_tokens=16_000,
    kv_tokens=65_536, max_running=32, bootstrap_port=8998,
)  # fmt: skip


def test_fresh_traffic_stays_within_the_server_and_differs_by_its_seed() -> None:
    plan = fresh_plan(random.Random(1))(FACTS, FACTS)
    assert len(plan.prefills) == len(plan.decodes) == LOADS
    assert all(48 <= new <= 2048 and not cached for new, cached in plan.prefills)
    assert all(count <= 32 and count * context < 65_536 for count, context in plan.decodes)
    assert plan != fresh_plan(random.Random(2))(FACTS, FACTS)


def test_a_phase_without_a_measurement_is_not_kept() -> None:
    outcome, report = Outcome(), Report(title="t")
    outcome.errors[Phase.DECODE] = [[0.1, 0.2, 0.3], [0.05]]
    note(report, Subject(name="pair", urls=("a", "b")), outcome)
    kept = {check.name: (check.value, check.ok) for check in report.checks}
    assert kept["pair: prefill time, median error"] == (None, False)
    assert kept["pair: decode time, median error"][1]
    assert report.spread["pair: decode time, median error, %"].high == 20.0


def test_a_pair_and_a_unified_server_are_measured() -> None:
    found = subjects({Role.PREFILL: "p", Role.DECODE: "d", Role.UNIFIED: "u"})
    assert [each.urls for each in found] == [("p", "d"), ("u", "u")]


def test_rounds_are_merged_by_what_was_disturbed_least() -> None:
    findings = Findings()
    findings.decodes[4, 100] += [Step(480, 0.01), Step(520, 0.02), Step(500, 0.5)]
    sample = findings.samples()[0]
    assert (sample.seconds, sample.batch.context_tokens) == (0.01, 500)


def test_what_the_same_load_differs_by_is_told() -> None:
    assert changes([[1.0, 1.5, 1.5], [2.0]]) == [0.5, 0.0]
