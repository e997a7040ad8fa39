"""How fast the simulator is: an hour of real traffic on eight servers, and what a request costs.

The Azure conversation hour (19,366 requests) is simulated in a process of its own, twice with one
seed: the logs must be the same bytes. Then the same arrival law for one, two and four times as
long: what a request costs must not grow.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Watch
from benchmarks.report import Check, Report, Spread, command_line, reported
from gateway.scenario import Scenario, WorkloadEntry
from gateway.settings import ConfigError
from gateway.simulation.plan import Plan, load, planned
from gateway.simulation.records import REQUESTS, RUNS, LogWriter
from gateway.simulation.runs import cases_of, run_case

SCENARIO = Path(__file__).parent / "scenarios" / "speed.toml"
QUICK_S = 600.0
LENGTHS = (1, 2, 4)
SHORTEST_S = 300.0
RATE = 12.0
GROWTH = 1.15


@dataclass(frozen=True, slots=True)
class Timed:
    """One simulation in a fresh process."""

    requests: int
    wall_s: float
    cpu_s: float
    rss_mib: float
    digest: str

    @property
    def us_per_request(self) -> float:
        return self.cpu_s * 1e6 / self.requests


def timed(plan: Plan) -> Timed:
    """In this process, whose memory is counted from its beginning."""
    wall, cpu = time.perf_counter(), time.process_time()
    outcome, records = run_case(plan, cases_of(plan)[0], with_records=True)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with tempfile.TemporaryDirectory() as folder:
        log = LogWriter(Path(folder))
        log.write(outcome.facts, records)
        log.close()
        content = b"".join((Path(folder) / name).read_bytes() for name in (REQUESTS, RUNS))
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Timed(len(records), wall, cpu, rss_mib, hashlib.sha256(content).hexdigest())


def apart(work: Callable[[Plan], Timed], plan: Plan) -> Timed:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (plan,))


def longer(scenario: Scenario, times: int, data: Path) -> Plan:
    """The fleet of the scenario under a steady synthetic load for so many times as long."""
    workload = WorkloadEntry(name="steady", rate=RATE, output_median=100.0)
    steady = dataclasses.replace(scenario, workload=(workload,), duration_s=SHORTEST_S * times)
    return planned(steady, data)


def measure(asked: argparse.Namespace) -> Report:
    plan, report, watch = load(SCENARIO, asked.data), Report(title="simspeed"), Watch.begin()
    if asked.quick:
        shorter = dataclasses.replace(plan.scenario, duration_s=QUICK_S)
        plan = dataclasses.replace(plan, scenario=shorter)
        report.notes.append(f"--quick: the first {QUICK_S:g} s of the hour")
    runs = [apart(timed, plan) for _ in range(2)]
    costs = {
        times: apart(timed, longer(plan.scenario, times, plan.data)).us_per_request
        for times in LENGTHS
    }
    report.spread["wall time, s"] = Spread.of(it.wall_s for it in runs)
    report.spread["CPU time, s"] = Spread.of(it.cpu_s for it in runs)
    for times, cost in costs.items():
        report.spread[f"CPU us/request over {times * SHORTEST_S:g} s"] = Spread.of([cost])
    report.notes += [f"{name}: {spread}" for name, spread in report.spread.items()]
    report.notes.append(watch.note())
    same = len({it.digest for it in runs}) == 1
    growth = costs[LENGTHS[-1]] / costs[LENGTHS[0]]
    report.checks = [
        Check(name=f"wall time of {runs[0].requests} requests",
              value=max(it.wall_s for it in runs), target=60.0, unit="s"),
        Check(name="memory", value=max(it.rss_mib for it in runs), target=1024.0, unit="MiB"),
        Check(name="logs of one seed that differ", value=0 if same else 1, target=0, unit=""),
        Check(name=f"CPU/request over {LENGTHS[-1]} times as long", value=growth, target=GROWTH,
              unit="x"),
    ]  # fmt: skip
    return report


def main() -> int:
    parser = command_line("simspeed", __doc__)
    parser.add_argument("--data", type=Path, help="where traces/ and profiles/ lie")
    asked = parser.parse_args()
    return reported(lambda: measure(asked), ConfigError, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
