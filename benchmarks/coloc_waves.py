"""The batch gateway people's own co-location benchmark: waves of chat above three batch jobs.

llm-d batch-gateway #491: 15 requests/s for 90 s, then 1 for 90 s, prompts of 512 tokens and answers
of 128, three batch jobs of 1,000 such requests, two replicas. Theirs at best: p95 of the first
token 92 ms against 71 without the batch, of a further token 29 ms against 13, and all of it done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random

from rich.table import Table

from benchmarks.coloc import DATA
from benchmarks.coloc_live import measure as measure_live
from benchmarks.coloc_shape import (
    ALONE,
    OURS,
    SYSTEMS,
    Shape,
    Waved,
    figures,
    scenario,
    write_waves,
)
from benchmarks.coloc_sweep import quiet
from benchmarks.processes import DidNotStart, Watch
from benchmarks.report import Check, Goal, Report, Spread, command_line, number, reported
from gateway.scenario import PolicyEntry
from gateway.settings import ConfigError
from gateway.simulation.plan import planned
from gateway.simulation.world import Case, World

QUICK_CYCLES = 1
TTFT_WORSE, TPOT_WORSE = 10.0, 20.0
SEEDS = (1, 2, 3)


def run(policy: PolicyEntry, shape: Shape, seed: int, data: Path, *, batch: bool) -> Waved:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "waves.csv"
        write_waves(path, shape.waves(Random(f"{seed}/waves")))
        plan = planned(scenario(policy, str(path), shape, batch=batch), data)
    ran = World(plan, Case(policy=plan.scenario.policy[0], load=1.0, seed=seed)).run()
    return figures(ran.records, shape)


def table_of(found: dict[str, list[Waved]]) -> Table:
    table = Table(title="waves of chat above 3,000 batch requests", title_justify="left")
    columns = ("", "TTFT p95, ms", "TPOT p95, ms", "batch done, %", "last at, s", "wasted tokens")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, runs in found.items():
        table.add_row(
            name,
            str(Spread.of(it.ttft_p95_ms for it in runs)),
            str(Spread.of(it.tpot_p95_ms for it in runs)),
            number(min(it.done for it in runs) * 100),
            number(max(it.last_s for it in runs)),
            number(max(it.wasted_tokens for it in runs)),
        )
    return table


def checks_of(found: dict[str, list[Waved]]) -> list[Check]:
    """Each seed beside itself without the batch; the worst of them counts."""
    pairs = list(zip(found[OURS.name], found[ALONE.name], strict=True))
    ttft = max((ours.ttft_p95_ms / alone.ttft_p95_ms - 1) * 100 for ours, alone in pairs)
    tpot = max((ours.tpot_p95_ms / alone.tpot_p95_ms - 1) * 100 for ours, alone in pairs)
    done = min(ours.done * 100 for ours, _ in pairs)
    return [
        Check(name="TTFT p95 above chat alone", value=ttft, target=TTFT_WORSE, unit="%"),
        Check(name="TPOT p95 above chat alone", value=tpot, target=TPOT_WORSE, unit="%"),
        Check(name="batch done", value=done, target=100.0, unit="%", goal=Goal.AT_LEAST),
    ]


def measure(asked: argparse.Namespace) -> Report:
    quiet()
    report, watch = Report(title="coloc_waves"), Watch.begin()
    shape = Shape(cycles=QUICK_CYCLES) if asked.quick else Shape()
    seeds = SEEDS[:1] if asked.quick else SEEDS
    found = {ALONE.name: [run(ALONE, shape, seed, asked.data, batch=False) for seed in seeds]}
    for policy in SYSTEMS:
        found[policy.name] = [run(policy, shape, seed, asked.data, batch=True) for seed in seeds]
    report.tables.append(table_of(found))
    report.checks = checks_of(found)
    for name, runs in found.items():
        report.spread[f"{name}: TTFT p95, ms"] = Spread.of(it.ttft_p95_ms for it in runs)
        report.spread[f"{name}: TPOT p95, ms"] = Spread.of(it.tpot_p95_ms for it in runs)
    report.notes.append(
        f"{shape}; percentiles over the chat requests of the high phases, as theirs are; the "
        "checks take the worst seed"
    )
    if asked.quick:
        report.notes.append("--quick: one seed, and one cycle instead of three")
    report.notes.append(watch.note())
    return report


def live(asked: argparse.Namespace) -> Report:
    quiet()
    return measure_live(asked.data, quick=asked.quick, worse=(TTFT_WORSE, TPOT_WORSE))


def main() -> int:
    parser = command_line("coloc_waves", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="where profiles/ lies")
    more = "in real time and shortened: an emulated fleet behind the real gateway"
    parser.add_argument("--live", action="store_true", help=more)
    asked = parser.parse_args()
    return reported(
        lambda: live(asked) if asked.live else measure(asked),
        ConfigError,
        DidNotStart,
        as_json=asked.json,
    )


if __name__ == "__main__":
    sys.exit(main())
