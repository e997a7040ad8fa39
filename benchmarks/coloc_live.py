"""The waves in real time: an emulated fleet, the real gateway before it, and a client over HTTP.

Three processes share this machine, so that the servers are made slower, and the waves with them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import uvloop
from rich.table import Table

from benchmarks.coloc_shape import (
    ALONE,
    OURS,
    Shape,
    Waved,
    figures,
    fleet,
    scenario,
    write_waves,
)
from benchmarks.fidelity import LATE_MS, ROOT, Player, emulate, wait_for, wait_until_ready
from benchmarks.processes import Watch, all_stopped, free_port, start, wait_until_listening
from benchmarks.report import Check, Goal, Report, number
from gateway.scenario import PolicyEntry, Scenario
from gateway.simulation.plan import Plan, planned
from gateway.simulation.world import Case, World

LIVE = Shape(cycles=1, phase_s=30.0, rows=28, speed=0.25)
"""A third of a phase, at a quarter of the speed; batch requests in the same proportion."""
QUICK_LIVE = replace(LIVE, phase_s=8.0, rows=8)
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The same requests, simulated and played."""

    simulated: Waved
    played: Waved
    late_ms: float
    """How late the client sent its requests, p99."""


def config_of(port: int, policy: PolicyEntry, workers: str) -> str:
    """The gateway's file; its targets are defaults where the policy is told none."""
    online, cost, policies = policy.classes.online, policy.cost, policy.policies
    lines = [
        "[server]",
        f"port = {port}",
        "[policies]",
        f'order = "{policies.order}"',
        f'pools = "{policies.pools}"',
        "[classes.online]",
        f"ttft_ms = {online.ttft_ms}",
        f"tpot_ms = {online.tpot_ms}",
        "[log]",
        'level = "error"',
        "requests = false",
    ]
    if cost.model:
        lines += ["[cost]", f'model = "{cost.model}"', f'device = "{cost.device}"']
    return "\n".join([*lines, workers])


def pair(policy: PolicyEntry, shape: Shape, data: Path, *, batch: bool) -> Pair:
    with all_stopped() as running, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace, workers, config = (folder / it for it in ("waves.csv", "workers.toml", "gw.toml"))
        write_waves(trace, shape.waves(Random(f"{SEED}/waves")))
        plan = planned(scenario(policy, str(trace), shape, batch=batch), data)
        ran = World(plan, Case(policy=plan.scenario.policy[0], load=1.0, seed=SEED)).run()
        options = ["--emulate", str(workers), "--speed", str(shape.speed), "--data", str(data)]
        emulator = [sys.executable, "-m", "benchmarks.coloc_live", *options]
        running.append(start("fleet", emulator, cwd=ROOT))
        wait_for(running[-1], workers)
        port = free_port()
        config.write_text(config_of(port, plan.scenario.policy[0], workers.read_text()))
        serve = [sys.executable, "-m", "gateway", "serve", "--config", str(config)]
        running.append(start("gateway", serve, cwd=ROOT))
        wait_until_listening(running[-1], port)
        player = played(plan, f"http://127.0.0.1:{port}")
    return Pair(
        simulated=figures(ran.records, shape),
        played=figures(player.records, shape),
        late_ms=player.late_ms(),
    )


def played(plan: Plan, url: str) -> Player:
    wait_until_ready(url)
    player = Player(plan, SEED, url, time.perf_counter)
    uvloop.run(player.play(plan.scenario.duration_s + plan.scenario.drain_s))
    return player


def table_of(found: Sequence[tuple[str, Pair]]) -> Table:
    table = Table(title="waves in real time", title_justify="left")
    columns = ("", "TTFT p95, ms", "TPOT p95, ms", "batch done, %", "last at, s")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, both in found:
        for how, it in (("simulated", both.simulated), ("played", both.played)):
            cells = (it.ttft_p95_ms, it.tpot_p95_ms, it.done * 100, it.last_s)
            table.add_row(f"{name}, {how}", *map(number, cells))
    return table


def checks_of(alone: Pair, ours: Pair, worse: tuple[float, float]) -> list[Check]:
    """The same as in the simulator, of what was played; `worse`: what TTFT and TPOT may be."""
    before, after = alone.played, ours.played
    ttft = (after.ttft_p95_ms / before.ttft_p95_ms - 1) * 100
    tpot = (after.tpot_p95_ms / before.tpot_p95_ms - 1) * 100
    late = max(alone.late_ms, ours.late_ms)
    name = "online requests sent late, p99 (more: the machine is too busy to tell)"
    done = after.done * 100
    return [
        Check(name="played: TTFT p95 above chat alone", value=ttft, target=worse[0], unit="%"),
        Check(name="played: TPOT p95 above chat alone", value=tpot, target=worse[1], unit="%"),
        Check(name="played: batch done", value=done, target=100.0, unit="%", goal=Goal.AT_LEAST),
        Check(name=name, value=late, target=LATE_MS, unit="ms"),
    ]


def measure(data: Path, *, quick: bool, worse: tuple[float, float]) -> Report:
    report, watch = Report(title="coloc_waves --live"), Watch.begin()
    shape = QUICK_LIVE if quick else LIVE
    alone = pair(ALONE, shape, data, batch=False)
    ours = pair(OURS, shape, data, batch=True)
    report.tables.append(table_of([(ALONE.name, alone), (OURS.name, ours)]))
    report.checks = checks_of(alone, ours, worse)
    report.notes += [
        str(shape),
        f"shortened: theirs is {Shape().cycles} cycles with phases of {Shape().phase_s:g} s, at "
        f"full speed, and {Shape().rows:,} requests in each job; one seed",
        "the gateway is told full-speed constants, here as in the simulation: it has to find out "
        "how slow its servers are",
        watch.note(),
    ]
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coloc_live", description="Only the "
                                     "fleet of coloc_waves --live, until interrupted.")  # fmt: skip
    parser.add_argument("--emulate", type=Path, required=True, metavar="FILE",
                        help="where the [[worker]] tables are written")  # fmt: skip
    parser.add_argument("--speed", type=float, required=True)
    parser.add_argument("--data", type=Path, required=True)
    asked = parser.parse_args()
    only = Scenario(fleet=(fleet(Shape(speed=asked.speed)),))
    plan = Plan(scenario=only, sources=(), data=asked.data)
    uvloop.run(emulate(plan, SEED, asked.emulate.write_text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
