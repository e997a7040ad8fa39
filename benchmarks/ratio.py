"""Prefill and decode servers in the right ratio: DOPD's claims, in the simulator, on equal terms.

(i)   A closed loop on six servers, from few clients to many: the highest rate at which both
      targets are kept at the 90th percentile, for unified servers, static splits, and two
      controllers that begin with 1P1D. Once with a model whose prompts take the time, and twice
      with one whose answers do: with such DOPD was measured against DistServe.
(ii)  Twenty minutes each of bursty code, reasoning and chat, and BurstGPT-like arrivals whose
      lengths shift, on up to eight GPUs that are paid for while they run: what was attained, and
      for how many GPU-seconds. A role switch takes 5 s, or 45 s as a relaunch would. Beside that:
      what our order does for Dynamo's planners, and how many times the load they have to plan for
      until they keep the targets.
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
    OURS,
    RELAUNCH_S,
    RIVALS,
    SWITCH_S,
    TABLE,
    TRACES,
    WORLDS,
    Closed,
    acting_policies,
    bursting,
    closed_plan,
    compared_policies,
    dynamic_plan,
    fixed_policies,
    is_ours,
    shifting,
    switching,
)
from benchmarks.report import Check, Goal, Report, Spread, command_line, reported
from gateway.scenario import PolicyEntry
from gateway.settings import ConfigError
from gateway.simulation.figures import Figures
from gateway.simulation.plan import Plan
from gateway.simulation.runs import Outcome, run_all
from gateway.simulation.summary import notes_of

ATTAINED = 99.4
LISTED = ("static 3P3D", "static 4P2D", "static 5P1D")
"""1P1D, 2P1D and, as near as six servers come to it, 3P1D: the paper's."""
NEAR = 0.03
"""Rates that differ by no more are the same."""
PHASE_S, QUICK_PHASE_S = 1200.0, 80.0
CLOSED_S, QUICK_CLOSED_S = (150.0, 60.0), (35.0, 25.0)
"""How long, and how much of it does not count."""
SWITCHES_S = (SWITCH_S, RELAUNCH_S)
SEEDS, QUICK_SEEDS = (11, 12, 13), (1,)
"""Policies are tuned on others: on 1 and 2."""


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
    """With the fewest clients that bring it; where none do, the highest rate."""
    enough = [point for point in curve if point.rate_per_s >= rate_per_s * (1 - NEAR)]
    if enough:
        return min(enough, key=lambda point: point.clients)
    return max(curve, key=lambda point: point.rate_per_s)


def closed_table(title: str, found: dict[str, list[Point]]) -> Table:
    table = Table(
        title=f"(i) closed loop, {CLOSED_SERVERS} servers, {title}: req/s, P90 TTFT and TPOT in ms",
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


def closed_checks(title: str, found: dict[str, list[Point]]) -> list[Check]:
    """Against DistServe-like where its rate is highest: behind its knee, as in the paper."""
    ours = goodput(found[OURS])
    listed = max(goodput(found[name]) for name in LISTED)
    best = max(goodput(curve) for name, curve in found.items() if name.startswith("static"))
    theirs = max(found["DistServe-like"], key=lambda point: point.rate_per_s)
    mine = at_rate(found[OURS], theirs.rate_per_s)
    checks = [
        _beside(f"{title}: goodput beside unified servers", ours, goodput(found["unified"]), 1.5),
        _beside(f"{title}: goodput beside 1P1D, 2P1D and 3P1D", ours, listed, 1.25),
        _beside(f"{title}: goodput beside the best of all static splits", ours, best, 1.25),
    ]
    for name, own, other, target in (
        ("P90 TTFT", mine.figures.ttft_ms.p90, theirs.figures.ttft_ms.p90, -67.5),
        ("P90 TPOT", mine.figures.tpot_ms.p90, theirs.figures.tpot_ms.p90, -22.8),
    ):
        change = None if own is None or not other else 100 * (own / other - 1)
        name = f"{title}: {name} beside DistServe-like at {theirs.rate_per_s:.0f}/s"
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


def mean(runs: Sequence[Held]) -> Held:
    """Over the seeds; of switches, starts and stops all."""
    count, first = len(runs), runs[0]
    shares = zip(*([share for _, share in run.by_phase] for run in runs), strict=True)
    names = [name for name, _ in first.by_phase]
    return Held(
        attained=sum(run.attained for run in runs) / count,
        by_phase=tuple((name, sum(each) / count) for name, each in zip(names, shares, strict=True)),
        gpu_s=sum(run.gpu_s for run in runs) / count,
        switched=sum(run.switched for run in runs),
        launched=sum(run.launched for run in runs),
        released=sum(run.released for run in runs),
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
    planners = [found[name] for name in RIVALS]
    return [
        Check(name=f"{load}: attained by {OURS}", value=ours.attained, target=ATTAINED, unit="%",
              goal=Goal.AT_LEAST),
        Check(name=f"{load}: attained above the better of Dynamo's planners",
              value=ours.attained - max(it.attained for it in planners), target=0.0, unit="points",
              goal=Goal.AT_LEAST),
        *(
            Check(name=f"{load}: GPU-seconds beside {name}",
                  value=ours.gpu_s / found[name].gpu_s, target=1.0, unit="x")
            for name in RIVALS
        ),
    ]  # fmt: skip


def equal_check(load: str, ours: Held, others: dict[str, Held]) -> Check:
    """What the targets cost all that keep them, planners with more in hand included."""
    enough = {name: it.gpu_s for name, it in others.items() if it.attained >= ATTAINED}
    cheapest = min(enough, key=enough.__getitem__, default="")
    name = f"{load}: GPU-seconds beside the cheapest other that attains {ATTAINED:g} %"
    return Check(
        name=f"{name}, {cheapest or 'which nobody does'}",
        value=ours.gpu_s / enough[cheapest] if cheapest else 0.0,
        target=1.0,
        unit="x",
    )


# All of it.


def demand(data: Path) -> None:
    """ConfigError where something is missing: it would be missed after minutes, or replaced."""
    for file in (Path(TABLE), *(Path("traces", name) for name in TRACES), forecast.SERIES):
        if not (data / file).is_file():
            raise ConfigError(f"{data / file} is not there; say with --data where it is")


def measure(asked: argparse.Namespace) -> Report:
    report = Report(title="ratio")
    demand(asked.data)
    if "closed" in asked.parts:
        for world in [it for it in WORLDS if it.quick or not asked.quick]:
            _closed(world, asked, report)
    if "dynamic" in asked.parts:
        _acting(SWITCH_S, asked, report)
    if "relaunch" in asked.parts and not asked.quick:
        _acting(RELAUNCH_S, asked, report)
    if "headroom" in asked.parts and not asked.quick:
        _headroom(asked, report)
    if "forecast" in asked.parts:
        _forecast(asked, report)
    if asked.quick:
        report.notes.append(
            "--quick: two of three models in the closed loop, with one or two loads, for "
            f"{QUICK_CLOSED_S[0]:g} s instead of {CLOSED_S[0]:g} s; phases of {QUICK_PHASE_S:g} s "
            f"instead of {PHASE_S:g} s, one seed; no relaunch, no planner with more in hand"
        )
    return report


def _closed(world: Closed, asked: argparse.Namespace, report: Report) -> None:
    clients = world.quick if asked.quick else world.clients
    lasts_s, warm_up_s = QUICK_CLOSED_S if asked.quick else CLOSED_S
    plan = closed_plan(asked.data, world, clients, duration_s=lasts_s, warm_up_s=warm_up_s)
    outcomes = simulated(plan, asked.processes, f"closed loop, {world.title}")
    report.notes += (f"{world.title}: {note}" for note in notes_of(outcomes))
    found = curves(outcomes)
    report.tables.append(closed_table(world.title, found))
    for name, curve in found.items():
        report.spread[f"{world.title}, goodput, {name}, req/s"] = Spread.of([goodput(curve)])
    report.checks += closed_checks(world.title, found)


LOADS = {"code, reasoning, chat": shifting, f"gamma {BURST_SHAPE:g}": bursting}


def _acting(switch_s: float, asked: argparse.Namespace, report: Report) -> None:
    """Ours and Dynamo's planners, with every seed."""
    seeds = QUICK_SEEDS if asked.quick else SEEDS
    for load in LOADS:
        title = f"{load}, switch {switch_s:g} s"
        policies = acting_policies(switch_s)
        runs = _runs(load, seeds, policies, asked)
        found = {name: mean(runs[switching(name, switch_s)]) for name in (*RIVALS, OURS)}
        report.tables.append(dynamic_table(f"(ii) {title}", found))
        for name, each in runs.items():
            attained = Spread.of([it.attained for it in each])
            report.spread[f"{load}, {name}, attained %"] = attained
            report.spread[f"{load}, {name}, GPU-s"] = Spread.of([it.gpu_s for it in each])
        report.checks += dynamic_checks(title, found)


def _headroom(asked: argparse.Namespace, report: Report) -> None:
    """What the targets cost everybody who keeps them, with one seed."""
    ours = [it for switch_s in SWITCHES_S for it in acting_policies(switch_s) if is_ours(it)]
    policies = [*ours, *fixed_policies(), *compared_policies()]
    for load in LOADS:
        runs = _runs(load, SEEDS[:1], policies, asked)
        found = {name: mean(each) for name, each in runs.items()}
        report.tables.append(dynamic_table(f"(ii) {load}, at equal attainment, one seed", found))
        others = {name: it for name, it in found.items() if not name.startswith(OURS)}
        for switch_s in SWITCHES_S:
            own = found[switching(OURS, switch_s)]
            report.checks.append(equal_check(f"{load}, switch {switch_s:g} s", own, others))


def _runs(
    load: str, seeds: Sequence[int], policies: Sequence[PolicyEntry], asked: argparse.Namespace
) -> dict[str, list[Held]]:
    phase_s = QUICK_PHASE_S if asked.quick else PHASE_S
    found: dict[str, list[Held]] = {}
    for seed in seeds:
        sources = LOADS[load](asked.data, phase_s, seed)
        plan = dynamic_plan(asked.data, sources, phase_s * len(sources), (seed,), policies)
        for outcome in simulated(plan, asked.processes, f"{load}, seed {seed}"):
            found.setdefault(outcome.facts.policy, []).append(held(outcome))
    return found


def _forecast(asked: argparse.Namespace, report: Report) -> None:
    part = forecast.measure(asked.data, quick=asked.quick)
    report.tables += part.tables
    report.checks += part.checks
    report.spread |= part.spread
    report.notes += part.notes


def main() -> int:
    parser = command_line("ratio", __doc__)
    parser.add_argument("--data", type=Path, default=forecast.DATA, help="where traces/ lies")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parts = ("closed", "dynamic", "relaunch", "headroom", "forecast")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="only these")
    asked = parser.parse_args()
    return reported(lambda: measure(asked), ConfigError, OSError, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
