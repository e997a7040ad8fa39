"""Kairos and what beats it: every baseline on a long tail, at the knee and far beyond it.

The set-up of the paper (8 s to the first token, 50 ms for each other one, one prefill and one
decode server) with a trace and a machine whose unknowns were chosen so that the paper's *baseline*
comes out (benchmarks/kairos_trace.py). The knee is the lowest rate, in tenths, at which first come,
first served has fallen to the paper's 76.1 % of first tokens in time. Then the same machine with
steps by the sum of contexts, and real traces at their own knee.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from benchmarks.kairos_systems import (
    BASELINE,
    ENGINE,
    MIXED,
    PATCHED,
    PLACED,
    PRINTED,
    REPAIRED,
    RESCUED,
    STOCK,
    SYSTEMS,
    System,
    Traffic,
    beside_offline,
    long_tail,
    minimax,
    on_two_pairs,
    replayed,
)
from benchmarks.kairos_trace import PAPER_TTFT, Law
from benchmarks.report import Check, Goal, Report, Spread, command_line, number
from gateway.settings import ConfigError
from gateway.simulation.records import Record
from gateway.simulation.world import Case, World
from policies.types import Kind

DATA = Path(__file__).parents[2] / "shared" / "data"
LAW = Law()
SUM_LAW = replace(LAW, answer_mean=200.0)
"""Where steps follow the sum of contexts, only shorter answers come near the paper's speed."""
KNEE = PAPER_TTFT[3.0]
KNEE_RATES = (3.0, 3.1, 3.2, 3.3, 3.4)
CURVE = (2.0, 2.8, 3.0, 3.4, 4.0, 5.0)
OVERLOAD = 5.0
SEEDS = (1, 2, 3)
QUICK = (BASELINE, "SGLang shortest-prefill-first", RESCUED)


@dataclass(frozen=True, slots=True)
class Task:
    traffic: Traffic
    system: System
    rate: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One run; shares are of all requests, in percent."""

    ttft: float
    tpot: float
    both: float
    tokens_per_s: float
    """Of the median request, after its first token."""
    worst_ttft_s: float
    """99 %."""
    worst_tpot_ms: float
    offline_tokens_per_s: float = 0.0


Key = tuple[str, str, float]


@dataclass(slots=True)
class Results:
    runs: dict[Key, list[Found]] = field(default_factory=dict)

    def of(self, traffic: Traffic, system: str, rate: float) -> list[Found]:
        return self.runs.get((traffic.name, system, rate), [])

    def mean(self, traffic: Traffic, system: str, rate: float, what: str) -> float:
        return fmean(getattr(it, what) for it in self.of(traffic, system, rate))

    def gains(self, traffic: Traffic, system: str, rate: float, what: str) -> list[float]:
        """Over the baseline with the same seed."""
        pairs = zip(self.of(traffic, system, rate), self.of(traffic, BASELINE, rate), strict=True)
        return [getattr(mine, what) - getattr(base, what) for mine, base in pairs]


def measured(task: Task, folder: Path) -> Found:
    plan = task.traffic.plan(task.system, task.rate, task.seed, folder)
    case = Case(policy=plan.scenario.policy[0], load=1.0, seed=task.seed)
    return found_in(World(plan, case).run().records)


def found_in(everything: Sequence[Record]) -> Found:
    """Of the online requests; offline ones count by what they were given while those came."""
    records = [it for it in everything if it.kind is Kind.ONLINE]
    others = [it for it in everything if it.kind is Kind.OFFLINE and it.has_finished]
    until_us = max(it.arrival_us for it in records)
    made = sum(it.output_tokens for it in others if (it.last_us or until_us) < until_us)
    ttfts = sorted(float("inf") if it.ttft_us is None else it.ttft_us / 1e6 for it in records)
    tpots = sorted(it.tpot_us / 1e3 for it in records if it.tpot_us is not None)
    return Found(
        ttft=100 * fmean(it.keeps_ttft for it in records),
        tpot=100 * fmean(it.keeps_tpot for it in records),
        both=100 * fmean(it.keeps_all for it in records),
        tokens_per_s=1e3 / median(tpots),
        worst_ttft_s=ttfts[int(0.99 * len(ttfts))],
        worst_tpot_ms=tpots[int(0.99 * len(tpots))],
        offline_tokens_per_s=1e6 * made / max(1, until_us),
    )


Wish = tuple[Traffic, Sequence[System], Sequence[float]]


class Bench:
    """Every run once, on all cores; what takes longest goes first, so that no core ends alone."""

    def __init__(self, folder: Path, *, quick: bool, processes: int) -> None:
        self.results = Results()
        self._folder = folder
        self._quick = quick
        self._processes = processes

    @property
    def systems(self) -> list[System]:
        return [it for it in SYSTEMS if not self._quick or it.name in QUICK]

    def run(self, wishes: Iterable[Wish], why: str) -> None:
        wanted = {
            (traffic.name, system.name, rate): (traffic, system, rate)
            for traffic, systems, rates in wishes
            for system in systems
            for rate in rates
            if (traffic.name, system.name, rate) not in self.results.runs
        }
        tasks = [Task(*each, seed) for each in wanted.values() for seed in SEEDS]
        tasks.sort(key=lambda task: task.system.needs != PATCHED)  # stable
        done = dict(zip(map(_key, tasks), self._each(tasks, why), strict=True))
        for key in wanted:
            self.results.runs[key] = [done[*key, seed] for seed in SEEDS]

    def _each(self, tasks: Sequence[Task], why: str) -> list[Found]:
        with (
            Progress(console=Console(stderr=True), transient=True) as progress,
            ProcessPoolExecutor(self._processes, get_context("spawn")) as pool,
        ):
            bar = progress.add_task(escape(why), total=len(tasks))
            futures = [pool.submit(measured, task, self._folder) for task in tasks]
            for future in as_completed(futures):
                future.result()
                progress.advance(bar)
            return [future.result() for future in futures]

    def knee(self, traffic: Traffic, rates: Sequence[float]) -> float:
        """The lowest of the rates at which the baseline has fallen to the paper's share."""
        for rate in rates:
            if self.results.mean(traffic, BASELINE, rate, "ttft") <= KNEE:
                return rate
        return rates[-1]


def _key(task: Task) -> tuple[str, str, float, int]:
    return task.traffic.name, task.system.name, task.rate, task.seed


def table_of(
    bench: Bench,
    traffic: Traffic,
    rate: float,
    title: str,
    systems: Sequence[System] = SYSTEMS,
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("system")
    table.add_column("needs")
    figures = ["tokens_per_s", "worst_ttft_s", "worst_tpot_ms"]
    for column in ("TTFT %", "TPOT %", "both %", "gain", "tokens/s", "TTFT p99, s", "TPOT p99, ms"):
        table.add_column(column, justify="right")
    if traffic.offline:
        table.add_column("offline tokens/s", justify="right")
        figures.append("offline_tokens_per_s")
    for system in systems:
        runs = bench.results.of(traffic, system.name, rate)
        if runs:
            gains = bench.results.gains(traffic, system.name, rate, "both")
            table.add_row(
                escape(system.name),
                system.needs,
                *(spread_of(getattr(it, what) for it in runs) for what in ("ttft", "tpot", "both")),
                f"{fmean(gains):+.1f}",
                *(number(fmean(getattr(it, what) for it in runs)) for what in figures),
            )
    return table


def spread_of(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{fmean(ordered):.1f} ({ordered[0]:.0f}-{ordered[-1]:.0f})"


def curve_of(bench: Bench, traffic: Traffic, rates: Sequence[float]) -> Table:
    table = Table(title=f"{traffic.name}: TTFT % / TPOT % / both % / tokens/s by rate")
    table.add_column("QPS", justify="right")
    names = (BASELINE, PRINTED, REPAIRED, RESCUED)
    for name in names:
        table.add_column(escape(name), justify="right")
    for rate in rates:
        cells = []
        for name in names:
            shares = [
                f"{bench.results.mean(traffic, name, rate, what):.1f}"
                for what in ("ttft", "tpot", "both", "tokens_per_s")
            ]
            cells.append(" / ".join(shares))
        table.add_row(f"{rate:g}", *cells)
    return table


def checks_of(bench: Bench, traffic: Traffic, knee: float) -> list[Check]:
    """The paper's gains, asked of the repaired rules."""
    results = bench.results

    def gain(what: str) -> float:
        return fmean(results.gains(traffic, RESCUED, knee, what))

    speed = results.mean(traffic, RESCUED, knee, "tokens_per_s")
    before = results.mean(traffic, BASELINE, knee, "tokens_per_s")
    wanted = (
        ("TTFT attainment, gain at the knee", gain("ttft"), 23.9, "points"),
        ("TPOT attainment, gain at the knee", gain("tpot"), 27.1, "points"),
        ("both, gain at the knee", gain("both"), 33.8, "points"),
        ("median decode speed, gain at the knee", 100 * (speed / before - 1), 19.3, "%"),
        ("TTFT attainment at 5.0 QPS", results.mean(traffic, RESCUED, OVERLOAD, "ttft"), 85.0, "%"),
    )
    return [
        Check(name=name, value=value, target=target, unit=unit, goal=Goal.AT_LEAST)
        for name, value, target, unit in wanted
    ]


def kept_table(bench: Bench, tables: Iterable[tuple[Traffic, float]]) -> Table:
    """The best that a gateway reaches without touching the engine, of the patched gain."""
    grid = Table(title="What is kept of each gain without a patched engine", title_justify="left")
    for column in ("traffic", "of", "patched", "best of stock", "kept", "by"):
        grid.add_column(column, justify="left" if column in {"traffic", "of", "by"} else "right")
    stock = [it.name for it in bench.systems if it.needs in (STOCK, ENGINE)]
    for traffic, rate in tables:
        for what in ("ttft", "tpot", "both"):
            patched = fmean(bench.results.gains(traffic, RESCUED, rate, what))
            gains = {n: fmean(bench.results.gains(traffic, n, rate, what)) for n in stock}
            top = max(gains, key=lambda name: gains[name])
            share = f"{100 * gains[top] / patched:.0f} %" if patched > 0 else "-"
            name = escape(f"{traffic.name} at {rate:g}")
            cells = (what, f"{patched:+.1f}", f"{gains[top]:+.1f}", share, escape(top))
            grid.add_row(name, *cells)
    return grid


def measure(bench: Bench, data: Path, *, quick: bool) -> Report:
    report = Report(title="kairos")
    tail = long_tail("long tail", LAW, straggler=True, rates=CURVE)
    replays = [] if quick else _there(replayed(LAW, data), data, report)
    knees: list[Wish] = [(it, SYSTEMS[:1], it.rates) for it in replays]
    bench.run([(tail, SYSTEMS[:1], KNEE_RATES), *knees], "where the baseline breaks down")
    knee = bench.knee(tail, KNEE_RATES)
    rates = sorted({knee, OVERLOAD} if quick else {2.0, 3.0, knee, OVERLOAD})
    at = [(it, bench.knee(it, it.rates)) for it in replays]
    wishes: list[Wish] = [(tail, bench.systems, rates)]
    if quick:
        report.notes.append("--quick: three systems, no curve, no other traffic")
        bench.run(wishes, tail.name)
    else:
        wishes += [(it, bench.systems, [rate]) for it, rate in at]
        _add_the_rest(bench, tail, knee, at, wishes, report)
    for place, rate in enumerate(rates):
        title = f"Long tail at {rate:g} QPS{', the knee' if rate == knee else ''}"
        report.tables.insert(place, table_of(bench, tail, rate, title))
    report.tables.append(kept_table(bench, [*((tail, rate) for rate in rates), *at]))
    report.checks = checks_of(bench, tail, knee)
    for what in ("ttft", "tpot", "both"):
        gains = bench.results.gains(tail, RESCUED, knee, what)
        report.spread[f"gain of {what} at the knee, points"] = Spread.of(gains)
    report.notes.append(f"the knee is at {knee:g} QPS; seeds {SEEDS}; {LAW}")
    return report


def _there(traffics: Iterable[Traffic], data: Path, report: Report) -> list[Traffic]:
    found = []
    for traffic in traffics:
        if (data / traffic.workload.trace).is_file():
            found.append(traffic)
        else:
            report.notes.append(f"{traffic.name}: {traffic.workload.trace} is not there")
    return found


def _add_the_rest(
    bench: Bench,
    tail: Traffic,
    knee: float,
    at: Sequence[tuple[Traffic, float]],
    wishes: list[Wish],
    report: Report,
) -> None:
    """All that is left is run in one go."""
    named = {it.name: it for it in SYSTEMS}
    by_sum = long_tail("steps by the sum of contexts", SUM_LAW, straggler=False, rates=(2.0, 2.4))
    two = long_tail("two pairs", LAW, straggler=True, rates=(2 * knee,))
    pairs = [(replace(two, fleet=minimax(LAW, straggler=True, pairs=2)), 2 * knee)]
    pairs += [(on_two_pairs(it), 2 * rate) for it, rate in at]
    mixed = [(beside_offline(it), 0.8 * rate) for it, rate in at]
    wishes.append((tail, [named[it] for it in (BASELINE, PRINTED, REPAIRED, RESCUED)], CURVE))
    wishes.append((by_sum, bench.systems, by_sum.rates))
    wishes += [(it, PLACED, [rate]) for it, rate in pairs]
    wishes += [(it, MIXED, [rate]) for it, rate in mixed]
    bench.run(wishes, "everything")
    for it, rate in pairs:
        title = f"{it.name}, two pairs of servers at {rate:g}"
        report.tables.append(table_of(bench, it, rate, title, PLACED))
    report.tables.append(curve_of(bench, tail, CURVE))
    for rate in by_sum.rates:
        title = f"The same machine, {by_sum.name}, {rate:g} QPS"
        report.tables.append(table_of(bench, by_sum, rate, title))
    for it, rate in at:
        title = f"{it.name}, {rate:g} times its pace, its knee"
        report.tables.append(table_of(bench, it, rate, title))
    for it, rate in mixed:
        title = f"{it.name} beside a backlog of offline work, {rate:g} times its pace"
        report.tables.append(table_of(bench, it, rate, title, MIXED))


def main() -> int:
    parser = command_line("kairos", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="where traces/ and profiles/ lie")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), quick=asked.quick, processes=asked.processes)
        try:
            report = measure(bench, asked.data.resolve(), quick=asked.quick)
        except ConfigError as problem:
            print(problem, file=sys.stderr)
            return 2
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
