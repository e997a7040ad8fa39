"""What a proxy costs: slackwater beside sglang-router, smg and no proxy, on the same bare workers.

All systems run at once and are loaded in turn, round after round, so that a noisy machine disturbs
all of them alike; a ratio is taken within a round, and the median of the rounds is what counts.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.load import Load, Outcome, apply, hold, quantile
from benchmarks.processes import DidNotStart, Running, Watch, all_stopped, raise_file_limit
from benchmarks.report import Check, Report, Spread, add_report_options, reported
from benchmarks.systems import (
    SYSTEMS,
    Fleet,
    NotInstalled,
    System,
    Target,
    require,
    start_fleet,
    start_systems,
    templated,
)

OURS, REFERENCE, BARE = "slackwater", "sglang-router", "bare"
STEP_MS = 20.0
SOAK_STEP_MS = 50.0
OPEN_STEP_MS = 1000.0
CLIENTS = 64
UNARY_CLIENTS = 32

STREAM_US = "CPU us/token"
ARRIVALS_US = "CPU us/token, arrivals spread"
UNARY_US = "CPU us/unary request"
TTFT_P50, TTFT_P99 = "TTFT p50 ms", "TTFT p99 ms"
ITL_P50, ITL_P99 = "inter-token p50 ms", "inter-token p99 ms"
PSS = "memory PSS MiB"
LATENCIES = (TTFT_P50, TTFT_P99, ITL_P50, ITL_P99)
COLUMNS = (STREAM_US, ARRIVALS_US, UNARY_US, *LATENCIES, PSS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long each load is."""

    rounds: int = 5
    tokens: int = 64
    passes: int = 3
    unary_requests: int = 3000
    soak_streams: int = 1000
    soak_tokens: int = 1200
    open_streams: int = 5000

    @property
    def stream_s(self) -> float:
        return self.tokens * STEP_MS / 1000

    def streams(self, url: str) -> Load:
        """All begin at once and stay in step: the load that the targets are set for."""
        requests = CLIENTS * self.passes
        return Load(url=url, clients=CLIENTS, requests=requests, tokens=self.tokens)

    def arrivals(self, url: str) -> Load:
        """The same streams, begun one after another: clients do not queue behind clients."""
        return replace(self.streams(url), spread_s=self.stream_s)

    def unary(self, url: str) -> Load:
        """Workers answer at once, so the clients ask as fast as the proxy can."""
        return Load(
            url=url, clients=UNARY_CLIENTS, requests=self.unary_requests, tokens=1, stream=False
        )

    def soak(self, url: str) -> Load:
        count, lasts_s = self.soak_streams, self.soak_tokens * SOAK_STEP_MS / 1000
        return Load(
            url=url,
            clients=count,
            requests=count,
            tokens=self.soak_tokens,
            spread_s=min(5.0, lasts_s / 4),
            patience_s=lasts_s + 30,
        )

    def held(self, url: str) -> Load:
        count = self.open_streams
        return Load(
            url=url,
            clients=count,
            requests=count,
            tokens=120,
            spread_s=count / 500,
            patience_s=60,
        )


FULL = Plan()
QUICK = Plan(rounds=3, tokens=32, passes=2, unary_requests=800, soak_tokens=120, open_streams=1000)


@dataclass(slots=True)
class Findings:
    """Samples by system and by what was measured, one a round; errors over everything."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    errors: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, system: str, what: str, value: float | None) -> None:
        if value is not None:
            self.samples.setdefault((system, what), []).append(value)

    def of(self, system: str, what: str) -> list[float]:
        return self.samples.get((system, what), [])

    def count_errors(self, system: str, outcome: Outcome) -> None:
        self.errors.setdefault(system, Counter()).update(outcome.errors)

    def failed(self, system: str) -> int:
        return self.errors.get(system, Counter()).total()

    def paired(self, what: str, left: str, right: str) -> list[tuple[float, float]]:
        """Values of the same round; none where one side was not measured in every round."""
        ours, theirs = self.of(left, what), self.of(right, what)
        return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []

    def ratios(self, what: str) -> list[float]:
        return [ours / theirs for ours, theirs in self.paired(what, OURS, REFERENCE)]

    def added(self, what: str, system: str) -> list[float]:
        return [through - bare for through, bare in self.paired(what, system, BARE)]


def loaded(target: Target, load: Load, findings: Findings) -> tuple[Outcome, float | None]:
    """Put the load on; the second value is the CPU seconds of the proxy, children included."""
    before = target.program.usage().cpu_s if target.program else None
    gc.collect()
    outcome = uvloop.run(apply(load))
    findings.count_errors(target.name, outcome)
    if before is None or target.program is None:
        return outcome, None
    return outcome, target.program.usage().cpu_s - before


def us_each(cpu_s: float | None, count: int) -> float | None:
    return cpu_s / count * 1e6 if cpu_s is not None and count else None


def add_latencies(findings: Findings, system: str, outcome: Outcome) -> None:
    for what, values, share in (
        (TTFT_P50, outcome.ttft_s, 0.5),
        (TTFT_P99, outcome.ttft_s, 0.99),
        (ITL_P50, outcome.gaps_s, 0.5),
        (ITL_P99, outcome.gaps_s, 0.99),
    ):
        found = quantile(values, share)
        findings.add(system, what, None if found is None else found * 1000)


def measure(target: Target, plan: Plan, findings: Findings) -> None:
    """One turn of one system."""
    if target.program is not None:
        outcome, cpu_s = loaded(target, plan.streams(target.url), findings)
        findings.add(target.name, STREAM_US, us_each(cpu_s, outcome.tokens))
    outcome, cpu_s = loaded(target, plan.arrivals(target.url), findings)
    findings.add(target.name, ARRIVALS_US, us_each(cpu_s, outcome.tokens))
    add_latencies(findings, target.name, outcome)
    if target.program is not None:
        outcome, cpu_s = loaded(target, plan.unary(target.url), findings)
        findings.add(target.name, UNARY_US, us_each(cpu_s, outcome.answered))
        findings.add(target.name, PSS, target.program.usage().pss_mib)


def compare(systems: list[System], plan: Plan, findings: Findings, console: Console) -> None:
    with all_stopped() as running:
        fleet = start_fleet(running, step_ms=STEP_MS)
        targets = start_systems(running, systems, fleet)
        warm_up = replace(plan, tokens=8, passes=1, unary_requests=500)
        for target in targets:
            measure(target, warm_up, Findings())
        for number in range(plan.rounds):
            for target in targets:
                console.print(f"round {number + 1} of {plan.rounds}: {target.name}", style="dim")
                measure(target, plan, findings)


def fresh(running: list[Running], system: System, step_ms: float) -> Target:
    fleet: Fleet = start_fleet(running, step_ms=step_ms, decodes=2)
    return start_systems(running, [system], fleet)[0]


def soak(system: System, plan: Plan, findings: Findings) -> Outcome:
    with all_stopped() as running:
        target = fresh(running, system, SOAK_STEP_MS)
        outcome, _ = loaded(target, plan.soak(target.url), findings)
        return outcome


def kib_per_stream(system: System, plan: Plan, findings: Findings) -> float | None:
    """Growth of the process's own memory with all streams open, over their number."""
    with all_stopped() as running:
        target = fresh(running, system, OPEN_STEP_MS)
        program = target.program
        if program is None:
            return None
        uvloop.run(apply(replace(plan.unary(target.url), requests=200)))
        before = program.usage().pss_mib
        outcome, after = uvloop.run(hold(plan.held(target.url), lambda: program.usage().pss_mib))
        findings.count_errors(target.name, outcome)
        return None if after is None else (after - before) * 1024 / plan.open_streams


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def told(errors: Counter[str]) -> str:
    return ", ".join(f"{flaw} x{count}" for flaw, count in errors.items()) or "none"


def cell(values: list[float]) -> str:
    return str(Spread.of(values)) if values else "-"


def costs_table(systems: Iterable[System], findings: Findings) -> Table:
    table = Table(title="Median (least-most) of the rounds", title_justify="left")
    names = [system.name for system in systems]
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for what in COLUMNS:
        table.add_row(what, *(cell(findings.of(name, what)) for name in names))
    for what in LATENCIES:
        added = [cell(findings.added(what, name)) if name != BARE else "-" for name in names]
        table.add_row(f"added {what}", *added)
    table.add_row("errors", *(str(findings.failed(name)) for name in names))
    return table


def report_costs(report: Report, systems: list[System], findings: Findings) -> None:
    names = [system.name for system in systems]
    for name in names:
        for what in COLUMNS:
            if values := findings.of(name, what):
                report.spread[f"{name}: {what}"] = Spread.of(values)
        if name != BARE:
            for what in LATENCIES:
                if values := findings.added(what, name):
                    report.spread[f"{name}: added {what}"] = Spread.of(values)
        if findings.failed(name):
            report.notes.append(f"{name}: errors: {told(findings.errors[name])}")
    if OURS in names and REFERENCE in names:
        check_ratios(report, findings)
    if OURS in names and BARE in names:
        added = median(findings.added(TTFT_P50, OURS))
        report.checks.append(Check(name="added TTFT p50", value=added, target=2.0, unit="ms"))
    report.tables.append(costs_table(systems, findings))


def check_ratios(report: Report, findings: Findings) -> None:
    for what, most in ((STREAM_US, 0.65), (UNARY_US, 0.75)):
        ratios = findings.ratios(what)
        if ratios:
            report.spread[f"{OURS} / {REFERENCE}: {what}"] = Spread.of(ratios)
        name = f"{what} beside {REFERENCE}"
        report.checks.append(Check(name=name, value=median(ratios), target=most, unit="x"))


def check_scale(report: Report, plan: Plan, findings: Findings) -> None:
    """What only our own gateway has to show: many streams, for long, in little memory."""
    outcome = soak(SYSTEMS[OURS], plan, findings)
    seconds = plan.soak_tokens * SOAK_STEP_MS / 1000
    report.notes.append(
        f"{plan.soak_streams} streams at {1000 / SOAK_STEP_MS:.0f} tokens/s for {seconds:.0f} s: "
        f"{outcome.answered} whole, {outcome.tokens} tokens, errors: {told(outcome.errors)}, "
        f"inter-token p99 {(quantile(outcome.gaps_s, 0.99) or 0) * 1000:.0f} ms"
    )
    missing = plan.soak_streams - outcome.answered
    name = f"{plan.soak_streams} streams for {seconds:.0f} s, not whole"
    report.checks.append(Check(name=name, value=missing, target=0, unit="streams"))
    each = kib_per_stream(SYSTEMS[OURS], plan, findings)
    name = f"memory of each of {plan.open_streams} open streams"
    report.checks.append(Check(name=name, value=each, target=40.0, unit="KB"))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proxy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
what is measured (64 clients, answers of 64 tokens, 20 ms apart, from one prefill and one decode
worker that do nothing but answer; 32 clients for unary requests):
  CPU us      user and system time of the proxy's process and its children, by the kernel
  added       latency through the proxy less latency of the workers alone, in the same round
  slackwater  then also: 1,000 streams for a minute, and the memory of 5,000 open streams

examples:
  python -m benchmarks.proxy                                  everything, about 5 minutes
  python -m benchmarks.proxy --quick --json                   within a minute, smaller loads
  python -m benchmarks.proxy --systems sglang-router,smg,bare the others alone
  python -m benchmarks.proxy --also 'mine=./mine --port {port} {prefill_port} {decode_port}'

The exit code is 0 when every check is kept, 1 when one is missed, 2 when a system did not start.
""",
    )
    parser.add_argument(
        "--systems",
        default=",".join(SYSTEMS),
        help=f"which, in which order; of {', '.join(SYSTEMS)} (default: all)",
    )
    parser.add_argument(
        "--also", type=templated, action="append", default=[], metavar="NAME=COMMAND"
    )
    parser.add_argument("--rounds", type=int, help="how often each system has its turn")
    add_report_options(parser)
    asked = parser.parse_args()
    if unknown := [name for name in asked.systems.split(",") if name not in SYSTEMS]:
        parser.error(f"unknown system {', '.join(unknown)}; known: {', '.join(SYSTEMS)}")
    return asked


def run(asked: argparse.Namespace, console: Console) -> Report:
    plan = QUICK if asked.quick else FULL
    plan = replace(plan, rounds=asked.rounds or plan.rounds)
    systems = [*(SYSTEMS[name] for name in asked.systems.split(",")), *asked.also]
    for system in systems:
        require(system)
    findings, report, watch = Findings(), Report(title="proxy"), Watch.begin()
    if asked.quick:
        report.notes.append(f"--quick: {plan}, instead of {FULL}")
    compare(systems, plan, findings, console)
    report_costs(report, systems, findings)
    if SYSTEMS[OURS] in systems:
        check_scale(report, plan, findings)
        failed = findings.failed(OURS)
        report.checks.append(Check(name="errors in all loads", value=failed, target=0, unit=""))
    report.notes.append(watch.note())
    return report


def main() -> int:
    asked = parsed()
    raise_file_limit()
    gc.disable()
    return reported(
        lambda: run(asked, Console(stderr=True)), NotInstalled, DidNotStart, as_json=asked.json
    )


if __name__ == "__main__":
    sys.exit(main())
