"""The batch gateway people's own co-location benchmark: waves of chat above three batch jobs.

llm-d batch-gateway #491: 15 requests/s for 90 s, then 1 for 90 s, prompts of 512 tokens and answers
of 128, three batch jobs of 1,000 such requests, two replicas. Theirs at best: p95 of the first
token 92 ms against 71 without the batch, of a further token 29 ms against 13, and all of it done.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from rich.table import Table

from benchmarks.coloc import DATA
from benchmarks.coloc_sweep import quiet
from benchmarks.coloc_systems import TABLE
from benchmarks.processes import Watch
from benchmarks.report import Check, Goal, Report, Spread, add_report_options, number
from gateway.config import Classes, Cost, Limits, Online, Policies
from gateway.scenario import (
    FleetEntry,
    PolicyEntry,
    Scenario,
    ServerEntry,
    WorkloadEntry,
    planned,
)
from gateway.settings import ConfigError
from gateway.simulation.figures import rank
from gateway.simulation.records import Record
from gateway.simulation.world import Case, World
from policies.types import Kind, Role

HIGH_PER_S, LOW_PER_S, PHASE_S = 15.0, 1.0, 90.0
CYCLES, QUICK_CYCLES = 3, 1
PROMPT_TOKENS, ANSWER_TOKENS = 512, 128
JOBS = {"30 min": 1800.0, "2 h": 7200.0, "24 h": 86_400.0}
ROWS = 1000
REPLICAS = 2
TTFT_MS, TPOT_MS = 150.0, 9.4
"""What the gateway is told: a token a fifth above what chat alone takes (7.8 ms)."""
TTFT_WORSE, TPOT_WORSE = 10.0, 20.0
SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waved:
    """What one system made of it with one seed."""

    ttft_p95_ms: float
    tpot_p95_ms: float
    done: float
    """The share of batch requests that ended while the waves went."""
    last_s: float
    """When the last of them ended."""
    wasted_tokens: int


def waves(cycles: int, random: Random) -> list[float]:
    """When chat requests come: Poisson at the rate of each phase."""
    times: list[float] = []
    for phase in range(2 * cycles):
        now_s, end_s = phase * PHASE_S, (phase + 1) * PHASE_S
        rate = HIGH_PER_S if _is_high(now_s) else LOW_PER_S
        while (now_s := now_s + random.expovariate(rate)) < end_s:
            times.append(now_s)
    return times


def write_waves(path: Path, times: Sequence[float]) -> None:
    with path.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(("timestamp", "input_tokens", "output_tokens"))
        rows.writerows((f"{at:.6f}", PROMPT_TOKENS, ANSWER_TOKENS) for at in times)


def scenario(policy: PolicyEntry, trace: str, cycles: int, *, batch: bool) -> Scenario:
    chat = WorkloadEntry(
        name="chat",
        arrivals="trace",
        trace=trace,
        max_tokens=ANSWER_TOKENS,
        ttft_ms=TTFT_MS,
        tpot_ms=TPOT_MS,
        patience=100.0,
    )
    jobs = tuple(
        WorkloadEntry(
            name=f"batch {name}",
            kind=Kind.OFFLINE,
            arrivals="backlog",
            count=ROWS,
            input_median=PROMPT_TOKENS,
            input_sigma=0.0,
            output_median=ANSWER_TOKENS,
            output_sigma=0.0,
            max_tokens=ANSWER_TOKENS,
            window_s=window_s,
        )
        for name, window_s in JOBS.items()
    )
    fleet = FleetEntry(
        device="h100",
        table=TABLE,
        server=(ServerEntry(role=Role.UNIFIED, count=REPLICAS, priority=True),),
    )
    return Scenario(
        fleet=(fleet,),
        workload=(chat, *(jobs if batch else ())),
        policy=(policy,),
        duration_s=2 * cycles * PHASE_S,
        drain_s=30.0,
    )


def _policy(name: str, **keys: object) -> PolicyEntry:
    entry = PolicyEntry(
        name=name,
        limits=Limits(max_queued=1_000_000),
        policies=Policies(order="fcfs", pools="none"),
    )
    return replace(entry, **keys)  # type: ignore[arg-type]  # checked where the scenario is planned


OURS = _policy(
    "ours",
    policies=Policies(),
    cost=Cost(model="Llama-3.1-8B", device="h100"),
    classes=Classes(online=Online(ttft_ms=TTFT_MS, tpot_ms=TPOT_MS)),
)
ALONE = _policy("chat alone")
SYSTEMS = (
    _policy("as they come", tells_classes=False),
    _policy("online first"),
    _policy("AIMD", door="aimd"),
    OURS,
)


def run(policy: PolicyEntry, cycles: int, seed: int, data: Path, *, batch: bool) -> Waved:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "waves.csv"
        write_waves(path, waves(cycles, Random(f"{seed}/waves")))
        plan = planned(scenario(policy, str(path), cycles, batch=batch), data)
    ran = World(plan, Case(policy=policy, load=1.0, seed=seed)).run()
    return figures(ran.records)


def _is_high(at_s: float) -> bool:
    return int(at_s // PHASE_S) % 2 == 0


def figures(records: Sequence[Record]) -> Waved:
    chat = [it for it in records if it.kind is Kind.ONLINE and _is_high(it.arrival_us / 1e6)]
    batch = [it for it in records if it.kind is Kind.OFFLINE]
    ended = [it for it in batch if it.has_finished]
    first = sorted(it.ttft_us / 1e3 for it in chat if it.ttft_us is not None)
    pace = sorted(it.tpot_us / 1e3 for it in chat if it.tpot_us is not None)
    return Waved(
        ttft_p95_ms=rank(first, 0.95) or float("nan"),
        tpot_p95_ms=rank(pace, 0.95) or float("nan"),
        done=len(ended) / len(batch) if batch else 1.0,
        last_s=max((it.last_us or 0) / 1e6 for it in ended) if ended else 0.0,
        wasted_tokens=sum(it.wasted_tokens for it in batch),
    )


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
    cycles = QUICK_CYCLES if asked.quick else CYCLES
    seeds = SEEDS[:1] if asked.quick else SEEDS
    found = {ALONE.name: [run(ALONE, cycles, seed, asked.data, batch=False) for seed in seeds]}
    for policy in SYSTEMS:
        found[policy.name] = [run(policy, cycles, seed, asked.data, batch=True) for seed in seeds]
    report.tables.append(table_of(found))
    report.checks = checks_of(found)
    for name, runs in found.items():
        report.spread[f"{name}: TTFT p95, ms"] = Spread.of(it.ttft_p95_ms for it in runs)
        report.spread[f"{name}: TPOT p95, ms"] = Spread.of(it.tpot_p95_ms for it in runs)
    report.notes.append(
        f"{REPLICAS} unified servers, Llama-3.1-8B on h100; {cycles} times {PHASE_S:g} s at "
        f"{HIGH_PER_S:g}/s and {PHASE_S:g} s at {LOW_PER_S:g}/s; the batch is there from the "
        "beginning; percentiles over the chat requests of the high phases, as theirs are; the "
        "checks take the worst seed"
    )
    if asked.quick:
        report.notes.append(f"--quick: one seed and {QUICK_CYCLES} cycle instead of {CYCLES}")
    report.notes.append(watch.note())
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coloc_waves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=DATA, help="where profiles/ lies")
    add_report_options(parser)
    asked = parser.parse_args()
    try:
        report = measure(asked)
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return 2
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
