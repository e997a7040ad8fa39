"""Prefill and decode servers in the right ratio: DOPD's claims, in the simulator, on equal terms.

(i)   A closed loop on six servers of a 70B model, from few clients to many: the highest rate at
      which both targets are kept at the 90th percentile, for unified servers, static splits, and
      two controllers that begin with 1P1D.
(ii)  Twenty minutes each of bursty code, reasoning and chat, and BurstGPT-like arrivals whose
      lengths shift, on up to eight GPUs that are paid for while they run: what was attained, and
      for how many GPU-seconds. A role switch takes 5 s, or 45 s as a relaunch would.
(iii) How good the forecasts are: `python -m benchmarks.forecast`.

Step times are measured ones; the policies predict by other constants and see no answer's length.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import forecast
from benchmarks.ratio_worlds import (
    BURST_SHAPE,
    CLOSED_SERVERS,
    CLOSED_TPOT_MS,
    CLOSED_TTFT_MS,
    RELAUNCH_S,
    SWITCH_S,
    bursting,
    closed_plan,
    dynamic_plan,
    shifting,
)
from benchmarks.report import Check, Goal, Report, Spread, add_report_options
from gateway.scenario import Plan
from gateway.settings import ConfigError
from gateway.simulation.figures import Figures
from gateway.simulation.runs import Outcome, run_all

OURS, PRINTED, LOAD, SLA = "dopd+", "dopd", "dyn-load", "dyn-sla"
ATTAINED = 99.4
EVEN = "static 3P3D"
"""1P1D on these servers."""
PHASE_S, QUICK_PHASE_S = 1200.0, 150.0
CLIENTS = (8, 64, 128, 192, 256, 320, 392, 448, 512)
QUICK_CLIENTS = (256, 392)


def simulated(plan: Plan, processes: int, title: str) -> list[Outcome]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0)
        return run_all(
            plan,
            processes=processes,
            keep=None,
            tick=lambda share: progress.update(task, completed=share),
        )


# (i)


@dataclass(frozen=True, slots=True)
class Point:
    """One system at one number of clients."""

    clients: float
    rate_per_s: float
    figures: Figures

    @property
    def keeps(self) -> bool:
        ttft_ms, tpot_ms = self.figures.ttft_ms.p90, self.figures.tpot_ms.p90
        if ttft_ms is None or tpot_ms is None:
            return False
        return ttft_ms <= CLOSED_TTFT_MS and tpot_ms <= CLOSED_TPOT_MS


def curves(outcomes: Sequence[Outcome]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for outcome in outcomes:
        facts, [figures] = outcome.facts, outcome.figures
        seconds = (facts.until_us - facts.from_us) / 1e6
        point = Point(facts.load, figures.finished / seconds, figures)
        found.setdefault(facts.policy, []).append(point)
    return found


def goodput(curve: Sequence[Point]) -> float:
    return max((point.rate_per_s for point in curve if point.keeps), default=0.0)


def at_rate(curve: Sequence[Point], rate_per_s: float) -> Point:
    return min(curve, key=lambda point: abs(point.rate_per_s - rate_per_s))


def closed_table(found: dict[str, list[Point]]) -> Table:
    table = Table(
        title=f"(i) closed loop on {CLOSED_SERVERS} servers: requests/s, P90 TTFT ms, P90 TPOT ms",
        title_justify="left",
    )
    table.add_column("clients", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    for points in zip(*found.values(), strict=True):
        table.add_row(f"{points[0].clients:g}", *map(_cell, points))
    table.add_row("goodput", *(f"{goodput(curve):.1f}/s" for curve in found.values()))
    table.caption = "* a target is missed"
    return table


def _cell(point: Point) -> str:
    ttft_ms, tpot_ms = point.figures.ttft_ms.p90 or 0.0, point.figures.tpot_ms.p90 or 0.0
    verdict = "" if point.keeps else " *"
    return f"{point.rate_per_s:.1f}/s {ttft_ms:.0f} {tpot_ms:.1f}{verdict}"


def closed_checks(found: dict[str, list[Point]]) -> list[Check]:
    ours = goodput(found[OURS])
    best = max(goodput(curve) for name, curve in found.items() if name.startswith("static"))
    knee = max((p for p in found[OURS] if p.keeps), key=lambda p: p.rate_per_s, default=None)
    checks = [
        _beside("goodput beside unified servers", ours, goodput(found["unified"]), 1.5),
        _beside("goodput beside 1P1D", ours, goodput(found[EVEN]), 1.25),
        _beside("goodput beside the best of all static splits", ours, best, 1.25),
    ]
    if knee is not None:
        other = at_rate(found["DistServe-like"], knee.rate_per_s)
        for name, mine, theirs, target in (
            ("P90 TTFT", knee.figures.ttft_ms.p90, other.figures.ttft_ms.p90, -67.5),
            ("P90 TPOT", knee.figures.tpot_ms.p90, other.figures.tpot_ms.p90, -22.8),
        ):
            change = None if mine is None or not theirs else 100 * (mine / theirs - 1)
            name = f"{name} beside DistServe-like at {other.rate_per_s:.0f}/s"
            checks.append(Check(name=name, value=change, target=target, unit="%"))
    return checks


def _beside(name: str, ours: float, theirs: float, target: float) -> Check:
    value = ours / theirs if theirs else None
    return Check(name=name, value=value, target=target, unit="x", goal=Goal.AT_LEAST)


# (ii)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One policy over the whole of a dynamic load."""

    attained: float
    """Per cent of all requests that kept both targets."""
    by_phase: tuple[tuple[str, float], ...]
    gpu_s: float
    switched: int
    launched: int
    released: int


def held(outcome: Outcome) -> Held:
    figures, facts = outcome.figures, outcome.facts
    kept = sum((it.attained or 0.0) * it.submitted for it in figures)
    return Held(
        attained=100 * kept / sum(it.submitted for it in figures),
        by_phase=tuple((it.workload, 100 * (it.attained or 0.0)) for it in figures),
        gpu_s=facts.gpu_s,
        switched=facts.switched,
        launched=facts.launched,
        released=facts.released,
    )


def dynamic_table(title: str, found: dict[str, Held]) -> Table:
    phases = [name for name, _ in next(iter(found.values())).by_phase]
    table = Table(title=title, title_justify="left")
    columns = ("attained %", *phases, "GPU-s", "switches", "starts", "stops")
    table.add_column("policy")
    for column in columns:
        table.add_column(column, justify="right")
    for name, it in found.items():
        shares = [f"{share:.1f}" for _, share in it.by_phase]
        counts = (it.switched, it.launched, it.released)
        table.add_row(name, f"{it.attained:.2f}", *shares, f"{it.gpu_s:,.0f}", *map(str, counts))
    return table


def dynamic_checks(load: str, found: dict[str, Held]) -> list[Check]:
    ours = found[OURS]
    planners = [found[name] for name in (LOAD, SLA)]
    enough = [it.gpu_s for name, it in found.items() if name != OURS and it.attained >= ATTAINED]
    return [
        Check(name=f"{load}: attained by {OURS}", value=ours.attained, target=ATTAINED, unit="%",
              goal=Goal.AT_LEAST),
        Check(name=f"{load}: attained above the better of Dynamo's planners",
              value=ours.attained - max(it.attained for it in planners), target=0.0, unit="points",
              goal=Goal.AT_LEAST),
        Check(name=f"{load}: GPU-seconds beside the cheaper of Dynamo's planners",
              value=ours.gpu_s / min(it.gpu_s for it in planners), target=1.0, unit="x"),
        Check(name=f"{load}: GPU-seconds beside the cheapest other that attains {ATTAINED:g} %",
              value=ours.gpu_s / min(enough) if enough else 0.0, target=1.0, unit="x"),
    ]  # fmt: skip


# All of it.


def measure(asked: argparse.Namespace) -> Report:
    report = Report(title="ratio")
    if "closed" in asked.parts:
        _closed(asked, report)
    if "dynamic" in asked.parts:
        _dynamic(asked, report)
    if "forecast" in asked.parts:
        _forecast(asked, report)
    if asked.quick:
        report.notes.append(
            f"--quick: {len(QUICK_CLIENTS)} loads of the closed loop, phases of "
            f"{QUICK_PHASE_S:g} s instead of {PHASE_S:g} s, one way of switching"
        )
    return report


def _closed(asked: argparse.Namespace, report: Report) -> None:
    if asked.quick:
        plan = closed_plan(asked.data, QUICK_CLIENTS, duration_s=75.0, warm_up_s=45.0)
    else:
        plan = closed_plan(asked.data, CLIENTS, duration_s=180.0, warm_up_s=60.0)
    found = curves(simulated(plan, asked.processes, "closed loop"))
    report.tables.append(closed_table(found))
    for name, curve in found.items():
        report.spread[f"closed loop, goodput, {name}, req/s"] = Spread.of([goodput(curve)])
    report.checks += closed_checks(found)


def _dynamic(asked: argparse.Namespace, report: Report) -> None:
    phase_s = QUICK_PHASE_S if asked.quick else PHASE_S
    switches = (SWITCH_S,) if asked.quick else (SWITCH_S, RELAUNCH_S)
    loads = {
        "code, reasoning, chat": shifting(asked.data, phase_s),
        f"gamma {BURST_SHAPE:g}": bursting(phase_s, seed=1),
    }
    for switch_s in switches:
        for load, sources in loads.items():
            plan = dynamic_plan(asked.data, sources, phase_s * len(sources), switch_s, (1,))
            title = f"{load}, switch {switch_s:g} s"
            outcomes = simulated(plan, asked.processes, title)
            found = {outcome.facts.policy: held(outcome) for outcome in outcomes}
            report.tables.append(dynamic_table(f"(ii) {title}", found))
            for name, it in found.items():
                report.spread[f"{title}, {name}, attained %"] = Spread.of([it.attained])
                report.spread[f"{title}, {name}, GPU-s"] = Spread.of([it.gpu_s])
            report.checks += dynamic_checks(title, found)


def _forecast(asked: argparse.Namespace, report: Report) -> None:
    part = forecast.measure(asked.data, quick=asked.quick)
    report.tables += part.tables
    report.checks += part.checks
    report.spread |= part.spread
    report.notes += part.notes


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ratio",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=forecast.DATA, help="where traces/ lies")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parts = ("closed", "dynamic", "forecast")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="only these")
    add_report_options(parser)
    asked = parser.parse_args()
    try:
        report = measure(asked)
    except (ConfigError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
