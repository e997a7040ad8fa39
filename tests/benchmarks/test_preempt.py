"""The benchmark of preemption: what it makes of its samples, and the part that needs no server."""

from __future__ import annotations

import pytest

from benchmarks.preempt import quantile, sglang
from benchmarks.preempt_cpu import core_us
from benchmarks.preempt_sglang import STEP_S, Found
from benchmarks.report import Report


def found(**fields: object) -> Found:
    base: dict[str, object] = {
        "freed_s": [STEP_S] * 120,
        "resumed_s": [0.1],
        "chunk_s": [0.1],
        "idle_s": [0.05],
        "behind_s": [0.15],
        "alone_s": [0.05],
        "beside_s": [0.055],
    }
    return Found(**base | fields)  # type: ignore[arg-type]  # fields of one's own choice


def missed(samples: Found) -> list[str]:
    report = Report(title="")
    sglang(report, samples)
    return [check.name for check in report.checks if not check.ok]


def test_what_keeps_all_targets_misses_none() -> None:
    assert missed(found()) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freed_s": [STEP_S * 2.5] * 120}, "median"),
        ({"freed_s": [STEP_S] * 117 + [STEP_S * 4] * 3}, "p99"),
        ({"freed_s": [STEP_S] * 50}, "behind the p99"),
        ({"behind_s": [0.4]}, "online prompt"),
        ({"beside_s": [0.07]}, "online chat"),
        ({"left": 1}, "left on any server"),
        ({"broken": 1}, "not whole"),
    ],
)
def test_what_misses_a_target_is_said_to(fields: dict[str, object], words: str) -> None:
    (name,) = missed(found(**fields))
    assert words in name


def test_the_core_is_timed_on_every_cycle() -> None:
    off, back = core_us(20)
    assert len(off) == len(back) == 20
    assert min(off + back) >= 0


def test_a_quantile_is_one_of_the_samples() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.5, 0.75, 0.99)] == [
        *(1.0, 2.0, 3.0, 4.0),
    ]
