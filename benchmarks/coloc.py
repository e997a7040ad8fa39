"""How much offline work fits beside online requests, without harm to them.

Several systems serve the same online requests on the same simulated servers while offline requests
(summaries of papers) are offered at growing rates. What counts is the most offline throughput with
at most 3 % of the online requests out of their targets (the OOCO authors' line), and, stricter,
with at most half a point more of them than without any offline work. Beside it stands what a
clairvoyant schedule could have served at most (`benchmarks.fluid`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.coloc_sweep import (
    AUTHORS,
    LOADS,
    QUICK_LOADS,
    Curve,
    Ground,
    Point,
    Task,
    grounds,
    in_turn,
)
from benchmarks.coloc_systems import (
    ABLATIONS,
    BESIDE,
    DECODES,
    DEVICE,
    MODEL,
    OURS,
    PEERS,
    PREFILLS,
    TRAFFIC,
    TTFT_MS,
    System,
    Traffic,
)
from benchmarks.processes import Watch
from benchmarks.report import Check, Goal, Report, Spread, command_line, number, reported
from gateway.settings import ConfigError

DATA = Path(__file__).parents[2] / "shared" / "data"
SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)
QUICK_S, QUICK_WARM_UP_S = 120.0, 30.0
GAIN = {"a": 1.5, "c": 3.0}
SHARE = {"b": 80.0}
WASTE = 5.0


@dataclass(slots=True)
class Found:
    """All curves of one trace."""

    traffic: Traffic
    grounds: dict[int, Ground]
    curves: dict[str, dict[int, Curve]] = field(default_factory=dict)

    def add(self, curve: Curve) -> None:
        self.curves.setdefault(curve.system, {})[curve.seed] = curve

    def best(self, system: str, *, stricter: bool) -> list[Point | None]:
        """Of each seed."""
        curves = [self.curves[system][seed] for seed in sorted(self.curves[system])]
        return [it.most(it.stricter_limit if stricter else max(AUTHORS, it.alone)) for it in curves]

    def tokens(self, system: str, *, stricter: bool) -> Spread:
        """A system that keeps no load has served nothing."""
        points = self.best(system, stricter=stricter)
        return Spread.of(0.0 if it is None else it.tokens_per_s for it in points)

    def requests(self, system: str, *, stricter: bool) -> float:
        points = self.best(system, stricter=stricter)
        return statistics.median(0.0 if it is None else it.requests_per_s for it in points)

    def bound(self, *, stricter: bool) -> float:
        """The median over the seeds, at the limit's own share of requests that may miss."""
        pick = min if stricter else max
        return statistics.median(
            it.bounds[pick(it.bounds)].tokens_per_s for it in self.grounds.values()
        )

    def wasted(self, system: str) -> float:
        """At the stricter score; of the worst seed."""
        points = self.best(system, stricter=True)
        return max(0.0 if it is None else it.wasted for it in points)

    def is_saturated(self, system: str) -> bool:
        """Whether even a backlog was kept, so that more load would not be more throughput."""
        tops = [max(it.points, key=lambda p: p.load) for it in self.curves[system].values()]
        limits = [it.stricter_limit for it in self.curves[system].values()]
        return all(top.violations <= limit for top, limit in zip(tops, limits, strict=True))


def rows_of(found: Found, systems: Sequence[System]) -> Table:
    traffic = found.traffic
    title = f"({traffic.key}) {traffic.about}"
    table = Table(title=title, title_justify="left")
    columns = ("system", "tokens/s, alone + 0.5 points", "requests/s", "of the bound",
               "tokens/s, at most 3 %", "of the bound", "wasted")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in systems:
        strict, loose = (found.tokens(system.key, stricter=it) for it in (True, False))
        backlog = " *" if found.is_saturated(system.key) else ""
        table.add_row(
            system.key,
            f"{strict}{backlog}",
            number(found.requests(system.key, stricter=True)),
            _percent(strict.median, found.bound(stricter=True)),
            str(loose),
            _percent(loose.median, found.bound(stricter=False)),
            f"{found.wasted(system.key) * 100:.1f} %",
        )
    bounds = [number(found.bound(stricter=it)) for it in (True, False)]
    table.add_row("fluid bound", bounds[0], "", "", bounds[1], "", "", style="dim")
    return table


def _percent(part: float, whole: float) -> str:
    return f"{part / whole * 100:.0f} %" if whole else "-"


def checks_of(found: Found) -> list[Check]:
    key = found.traffic.key
    ours = found.tokens(OURS.key, stricter=True)
    best = max(found.tokens(it.key, stricter=True).median for it in PEERS)
    checks = []
    if key in GAIN:
        gain = ours.median / best if best else float("inf")
        name = f"({key}) offline tokens/s beside the best baseline, stricter score"
        checks.append(Check(name=name, value=gain, target=GAIN[key], unit="x", goal=Goal.AT_LEAST))
    for stricter, line in ((True, "stricter score"), (False, "at most 3 %")):
        best = max(found.tokens(it.key, stricter=stricter).median for it in (*PEERS, *BESIDE))
        mine = found.tokens(OURS.key, stricter=stricter).median
        name = f"({key}) the same beside all others, {line}"
        gain = mine / best if best else float("inf")
        checks.append(Check(name=name, value=gain, target=1.0, unit="x", goal=Goal.AT_LEAST))
    if key in SHARE:
        share = ours.median / found.bound(stricter=True) * 100
        name = f"({key}) share of the fluid bound"
        checks.append(
            Check(name=name, value=share, target=SHARE[key], unit="%", goal=Goal.AT_LEAST)
        )
    wasted = found.wasted(OURS.key) * 100
    checks.append(Check(name=f"({key}) wasted tokens", value=wasted, target=WASTE, unit="%"))
    return checks


def spread_of(found: Found, systems: Sequence[System]) -> dict[str, Spread]:
    key = found.traffic.key
    return {
        f"({key}) {system.key}: {name}, tokens/s": found.tokens(system.key, stricter=stricter)
        for system in systems
        for name, stricter in (("alone + 0.5 points", True), ("at most 3 %", False))
    }


def chosen(asked: argparse.Namespace) -> tuple[list[Traffic], list[System], Sequence[int]]:
    traffic = [it for it in TRAFFIC if not asked.only or it.key in asked.only]
    systems = [*PEERS, *BESIDE, OURS, *ABLATIONS]
    seeds = SEEDS[: asked.seeds] if asked.seeds else SEEDS
    if asked.quick:
        traffic = [replace(it, duration_s=QUICK_S, warm_up_s=QUICK_WARM_UP_S) for it in traffic]
        beside = [replace(it, budgets=it.budgets[2::3]) for it in BESIDE]
        systems, seeds = [*PEERS, *beside, OURS], QUICK_SEEDS
    if asked.systems:
        systems = [it for it in systems if it.key in asked.systems.split(",")]
    return traffic, systems, seeds


def run(asked: argparse.Namespace, tick: Callable[[float], object]) -> list[Found]:
    traffic, systems, seeds = chosen(asked)
    processes = asked.processes or os.cpu_count() or 1
    reference = PEERS[1].policy
    found = {it.key: Found(it, {}) for it in traffic}
    for ground in grounds([(it, reference, seed, asked.data) for it in traffic for seed in seeds],
                          processes):  # fmt: skip
        found[ground.traffic].grounds[ground.seed] = ground
    tasks = [
        Task(
            traffic=found[it.key].traffic,
            system=system,
            seed=seed,
            unit_per_s=found[it.key].grounds[seed].unit_per_s,
            alone=found[it.key].grounds[seed].alone.violations,
            counted=found[it.key].grounds[seed].counted,
            loads=QUICK_LOADS if asked.quick else LOADS,
            data=asked.data,
        )
        for it in traffic
        for system in systems
        for seed in (seeds[:1] if system in ABLATIONS else seeds)
    ]
    for done, curve in enumerate(in_turn(tasks, processes), start=1):
        found[curve.traffic].add(curve)
        tick(done / len(tasks))
    return list(found.values())


def describe(found: Sequence[Found], report: Report) -> None:
    report.notes.append(
        f"{PREFILLS} prefill and {DECODES} decode servers, {MODEL} on {DEVICE}, for every system; "
        f"target for the first token {TTFT_MS / 1e3:g} s; offline: lengths of arXiv summaries, "
        "Poisson arrivals"
    )
    for it in found:
        grounds = list(it.grounds.values())
        alone = Spread.of(ground.alone.violations * 100 for ground in grounds)
        tpot_ms = it.traffic.tpot_ms
        pace = Spread.of(ground.median_tpot_ms / tpot_ms * 100 for ground in grounds)
        report.notes.append(
            f"({it.traffic.key}) online alone: {alone} % out of target, median time of a token "
            f"{pace} % of its target of {tpot_ms:g} ms, {grounds[0].online} requests in "
            f"{it.traffic.duration_s:g} s; {it.traffic.strict} of the decode servers are strict "
            "in ours"
        )
    report.notes.append(f"step times: {next(iter(found[0].grounds.values())).source}")
    report.notes.append(
        "ablations: one seed; a run ends where it has missed more than either limit lets it"
    )
    report.notes.append(
        "medians over the seeds (least-most); *: kept even with a backlog of 1.2 times the bound"
    )


def measure(asked: argparse.Namespace) -> Report:
    report, watch = Report(title="coloc"), Watch.begin()
    columns = (TextColumn("simulating"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        found = run(asked, lambda share: progress.update(task, completed=share))
    systems = chosen(asked)[1]
    for it in found:
        report.tables.append(rows_of(it, systems))
        report.spread |= spread_of(it, systems)
        if OURS in systems and set(PEERS) <= set(systems):
            report.checks += checks_of(it)
    describe(found, report)
    if asked.quick:
        report.notes.append(
            f"--quick: one seed, {QUICK_S:g} s of each trace ({QUICK_WARM_UP_S:g} of them not "
            "counted), coarser grids of loads and budgets, no ablations"
        )
    report.notes.append(watch.note())
    return report


def main() -> int:
    parser = command_line("coloc", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="where traces/ and profiles/ lie")
    parser.add_argument("--processes", type=int, default=0, help="default: one for each core")
    parser.add_argument("--only", default="", help="letters of traces, such as ac")
    parser.add_argument("--systems", default="", help="names, with commas between them")
    parser.add_argument("--seeds", type=int, default=0, help="how many of the three")
    asked = parser.parse_args()
    return reported(lambda: measure(asked), ConfigError, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
