"""How well a calibrated cost model predicts a live server: prefill and decode times, fresh traffic.

`slackwater calibrate` measures each server and fits constants. Then come prompts and batches of
other sizes, drawn at random, and each is compared with what was predicted before it was sent.
Times are the server's own counters in both halves; each load counts with the lower quartile
of its rounds, as what disturbs a server can only make it slower.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backends.calibration_run import MOST_TOKENS, CannotMeasure, Facts, Plan
from benchmarks.fidelity_sglang import fleet_on_cpu
from benchmarks.processes import (
    DidNotStart,
    Running,
    Watch,
    all_stopped,
    free_port,
    start,
    wait_until_listening,
)
from benchmarks.report import Check, Report, Spread, add_report_options, number
from gateway.calibrate import fit_servers
from gateway.calibrate_live import Asked, Measured, measure_servers
from gateway.clock import LiveClock
from policies.calibration import CalibrationError, Setup, relative_errors, summarise
from policies.constants import Constants
from policies.roofline import Phase
from policies.types import Role

TARGET_PERCENT = 15.0
LOADS = 14
"""Prompts, and as many batches, of one round of fresh traffic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    repeats: int
    calibrate_s: float
    fresh_s: float


FULL = Effort(repeats=3, calibrate_s=60.0, fresh_s=40.0)
QUICK = Effort(repeats=1, calibrate_s=18.0, fresh_s=9.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured: (prefill, decode), the same address twice for a unified server."""

    name: str
    urls: tuple[str, str]


@dataclass(slots=True)
class Outcome:
    """The relative errors of one subject, one list a repeat."""

    errors: dict[Phase, list[list[float]]] = field(
        default_factory=lambda: {phase: [] for phase in Phase}
    )
    again: dict[Phase, list[float]] = field(default_factory=lambda: {phase: [] for phase in Phase})
    """How much the same load differed from one round to the next: no prediction can do better."""
    behind: list[float] = field(default_factory=list)
    disturbed: int = 0


def fresh_plan(rng: random.Random) -> Callable[[Facts, Facts], Plan]:
    """Sizes as they come, not those of the calibration; all within the server's limits."""

    def between(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))

    def plan(prefill: Facts, decode: Facts) -> Plan:
        longest = min(prefill.chunk_tokens, prefill.context_tokens - 2)
        context = min(8000, decode.context_tokens - MOST_TOKENS - 2)
        batches: list[tuple[int, int]] = []
        while len(batches) < LOADS:
            batch = (between(1, min(decode.max_running, 128)), between(64, context))
            if batch[0] * (batch[1] + MOST_TOKENS) <= 0.7 * decode.kv_tokens:
                batches.append(batch)
        return Plan(prefills=[(between(48, longest), 0) for _ in range(LOADS)], decodes=batches)

    return plan


@dataclass(slots=True)
class Trial:
    """One subject, calibrated and tested again and again."""

    subject: Subject
    setup: tuple[str, str]
    """Model and device; empty is what the server says."""
    effort: Effort
    rng: random.Random
    report: Callable[[float, str], None]

    async def run(self, clock: LiveClock) -> Outcome:
        outcome = Outcome()
        for _ in range(self.effort.repeats):
            calibrated = await self._measured(clock, self.effort.calibrate_s)
            setup, found, _ = fit_servers(calibrated)
            plan = fresh_plan(self.rng)
            fresh = await self._measured(clock, self.effort.fresh_s, plan)
            self._note(outcome, setup, found.constants, calibrated, fresh)
        return outcome

    async def _measured(
        self,
        clock: LiveClock,
        seconds: float,
        plan: Callable[[Facts, Facts], Plan] | None = None,
    ) -> Measured:
        model, device = self.setup
        asked = Asked(targets=(self.subject.urls,), model=model, device=device, seconds=seconds)
        if plan is None:
            return await measure_servers(asked, clock, self.rng, self.report)
        return await measure_servers(asked, clock, self.rng, self.report, plan)

    @staticmethod
    def _note(
        outcome: Outcome,
        setup: Setup,
        constants: Constants,
        calibrated: Measured,
        fresh: Measured,
    ) -> None:
        cost = setup.cost(constants)
        for phase in Phase:
            outcome.errors[phase].append(relative_errors(cost, fresh.samples, phase))
        for found in (*calibrated.found, *fresh.found):
            steps = [[step.seconds for step in each] for each in found.decodes.values()]
            outcome.again[Phase.DECODE] += changes(steps)
            outcome.again[Phase.PREFILL] += changes(found.prefills.values())
        outcome.behind += relative_errors(cost, calibrated.behind_prefixes, Phase.PREFILL)
        outcome.disturbed += calibrated.disturbed + fresh.disturbed


def changes(loads: Iterable[Sequence[float]]) -> list[float]:
    return [abs(b / a - 1) for rounds in loads for a, b in pairwise(rounds)]


def emulated(running: list[Running]) -> list[Subject]:
    port = free_port()
    counts = [word for role in Role for word in (f"--{role}", "1")]
    command = [sys.executable, "-m", "gateway", "emulate", *counts, "--port-base", str(port)]
    program = start("emulated fleet", command)
    running.append(program)
    wait_until_listening(program, port + len(Role) - 1)
    return subjects({role: f"http://127.0.0.1:{port + i}" for i, role in enumerate(Role)})


def real(running: list[Running], folder: Path) -> list[Subject]:
    """SGLang on this machine's CPU, as `slackwater fleet` starts it."""
    return subjects(fleet_on_cpu(running, folder / "workers.toml", Role))


def subjects(urls: dict[Role, str]) -> list[Subject]:
    pair = (urls[Role.PREFILL], urls[Role.DECODE])
    alone = (urls[Role.UNIFIED], urls[Role.UNIFIED])
    return [Subject(name="pair", urls=pair), Subject(name="unified", urls=alone)]


def named(asked: argparse.Namespace) -> list[Subject]:
    found = [Subject(name=f"unified {url}", urls=(url, url)) for url in asked.worker]
    if asked.prefill and asked.decode:
        found.append(Subject(name=f"pair {asked.decode}", urls=(asked.prefill, asked.decode)))
    return found


def measured(
    subject: Subject, setup: tuple[str, str], effort: Effort, console: Console, seed: int
) -> Outcome:
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        Progress(console=console, transient=True) as progress,
    ):
        bar = progress.add_task(subject.name, total=1.0)
        trial = Trial(
            subject,
            setup,
            effort,
            random.Random(seed),
            lambda share, what: progress.update(bar, completed=share, description=what),
        )
        return runner.run(trial.run(LiveClock(runner.get_loop())))


def note(report: Report, subject: Subject, outcome: Outcome) -> Table:
    grid = Table(title=f"{subject.name}: error of predictions, %", title_justify="left")
    for column in ("phase", "loads", "median of each repeat", "p95 of all", "the same load again"):
        grid.add_column(column, justify="left" if column == "phase" else "right")
    for phase, repeats in outcome.errors.items():
        medians = [100 * found.median for errors in repeats if (found := summarise(errors))]
        everything = summarise([error for errors in repeats for error in errors])
        name = f"{subject.name}: {phase} time, median error"
        again = "-"
        if outcome.again[phase]:
            changed = Spread.of(100 * change for change in outcome.again[phase])
            report.spread[f"{subject.name}: {phase}, the same load again, %"] = changed
            again = number(changed.median)
        if everything:
            spread = report.spread[f"{name}, %"] = Spread.of(medians)
            grid.add_row(
                phase, str(everything.count), str(spread), f"{100 * everything.p95:.1f}", again
            )
        value = Spread.of(medians).median if medians else None
        report.checks.append(Check(name=name, value=value, target=TARGET_PERCENT, unit="%"))
    if outcome.behind:
        behind = Spread.of(100 * error for error in outcome.behind)
        grid.caption = f"prompts behind a cached prefix, not fitted: {behind}"
    return grid


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
Without servers, emulated ones are started: they keep the times of an 8B model on an H100, by a rule
that is not the cost model's.

examples:
  python -m benchmarks.calibration --quick
  python -m benchmarks.calibration --sglang --json
  python -m benchmarks.calibration --prefill URL --decode URL --model Qwen3-32B --gpu h100 --json
""",
    )
    parser.add_argument("--sglang", action="store_true", help="start real servers on this CPU")
    parser.add_argument("--worker", action="append", default=[], metavar="URL", help="unified")
    parser.add_argument("--prefill", metavar="URL")
    parser.add_argument("--decode", metavar="URL")
    parser.add_argument("--model", default="", help="default: what the server says")
    parser.add_argument("--gpu", default="", help="default: what the server says")
    parser.add_argument("--seed", type=int, default=1, help="of the fresh traffic")
    add_report_options(parser)
    return parser.parse_args()


def main() -> int:
    asked = parsed()
    effort = QUICK if asked.quick else FULL
    report, watch = Report(title="calibration"), Watch.begin()
    report.notes.append(f"{effort}, {'shortened by --quick' if asked.quick else 'full length'}")
    console = Console(stderr=True)
    setup = (asked.model, asked.gpu)
    with all_stopped() as running, tempfile.TemporaryDirectory() as folder:
        try:
            found = named(asked)
            if not found and asked.sglang:
                found, setup = real(running, Path(folder)), (asked.model, asked.gpu or "cpu")
            elif not found:
                found, setup = emulated(running), ("Llama-3.1-8B", "h100")
            for subject in found:
                outcome = measured(subject, setup, effort, console, asked.seed)
                report.tables.append(note(report, subject, outcome))
                if outcome.disturbed:
                    report.notes.append(f"{subject.name}: {outcome.disturbed} loads left out")
        except (CannotMeasure, CalibrationError, DidNotStart, ValueError) as error:
            console.print(f"calibration: {error}", style="red", markup=False, highlight=False)
            return 1
    report.notes.append(watch.note())
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
