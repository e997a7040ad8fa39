"""What repeated runs say together: the median over the seeds, the least and the most."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gateway.simulation.figures import Figures
from gateway.simulation.moves import move_note
from gateway.simulation.runs import Outcome
from policies.types import Kind

Pick = Callable[[Figures], float | None]


@dataclass(frozen=True, slots=True)
class Spread:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where a seed measured nothing."""
        known = [value for value in values if value is not None]
        return cls(min(known), statistics.median(known), max(known)) if known else None


METRICS: dict[str, Pick] = {
    "ttft_attained": lambda it: it.ttft_attained if it.kind is Kind.ONLINE else None,
    "tpot_attained": lambda it: it.tpot_attained if it.kind is Kind.ONLINE else None,
    "attained": lambda it: it.attained,
    "ttft_ms_p50": lambda it: it.ttft_ms.p50,
    "ttft_ms_p90": lambda it: it.ttft_ms.p90,
    "ttft_ms_p99": lambda it: it.ttft_ms.p99,
    "tpot_ms_p50": lambda it: it.tpot_ms.p50,
    "tpot_ms_p90": lambda it: it.tpot_ms.p90,
    "tpot_ms_p99": lambda it: it.tpot_ms.p99,
    "goodput_per_s": lambda it: it.goodput_per_s,
    "tokens_per_s": lambda it: it.tokens_per_s,
    "submitted": lambda it: it.submitted,
    "rejected": lambda it: it.rejected,
    "failed": lambda it: it.failed,
    "unfinished": lambda it: it.unfinished,
    "retries": lambda it: it.retries,
    "wasted_tokens": lambda it: it.wasted_tokens,
    "gpu_s": lambda it: it.gpu_s,
}
"""Every figure that is reported, by the name that the JSON has for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload under one policy at one load."""

    load: float
    policy: str
    workload: str
    kind: Kind
    seeds: int
    metrics: dict[str, Spread | None]
    parts_ms: tuple[float, ...]


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    found: dict[tuple[float, str, str], list[Figures]] = {}
    for outcome in outcomes:
        for figures in outcome.figures:
            key = (outcome.facts.load, outcome.facts.policy, figures.workload)
            found.setdefault(key, []).append(figures)
    return [_row(*key, figures) for key, figures in found.items()]


def _row(load: float, policy: str, workload: str, figures: Sequence[Figures]) -> Row:
    parts = [it.parts_ms for it in figures if it.parts_ms]
    return Row(
        load=load,
        policy=policy,
        workload=workload,
        kind=figures[0].kind,
        seeds=len(figures),
        metrics={name: Spread.of(map(pick, figures)) for name, pick in METRICS.items()},
        parts_ms=tuple(statistics.median(part) for part in zip(*parts, strict=True)),
    )


def left_out(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """The most that any run left out or cut; the same rows are left out of every run of a load."""
    what = ("skipped_rows", "too_large", "cut_answers")
    return {name: max(getattr(it.facts, name) for it in outcomes) for name in what}


def notes_of(outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader must know beside the figures."""
    counts = left_out(outcomes)
    words = {
        "skipped_rows": "rows of traces made no request and were skipped",
        "too_large": "requests were larger than any server and were left out",
        "cut_answers": "answers were longer than the limit of their request and end there",
    }
    sources = dict.fromkeys(source for it in outcomes for source in it.sources)
    return (
        [f"step times: {source}" for source in sources]
        + [f"{counts[name]} {text}" for name, text in words.items() if counts[name]]
        + [note for it in outcomes for note in move_note(_run_of(it), it.moves)]
    )


def _run_of(outcome: Outcome) -> str:
    facts = outcome.facts
    return f"{facts.policy} (load {facts.load:g}, seed {facts.seed})"
