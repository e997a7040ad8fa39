"""Whether the simulator tells the truth: one workload simulated, and played in real time.

The fleet of a scenario is emulated (one process), the real gateway stands before it (another), and
a client sends every request at its time over HTTP. The same requests are simulated. Attainment and
median latencies have to agree. With --sglang the fleet is real SGLang on this CPU, simulated with
constants calibrated on it just before; with --url the workload goes to a gateway that is there
already. Of these two the comparison is printed, whatever it is, and not checked.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import orjson
import uvloop
from rich.table import Table

from backends.calibration_run import CannotMeasure
from backends.emulator import EmulatedFleet, ServerSpec
from backends.steptimes import Noisy
from backends.workload import Ask
from benchmarks.fidelity_sglang import CALIBRATE_S, QUICK_CALIBRATE_S, calibrated_pair
from benchmarks.processes import (
    DidNotStart,
    Running,
    Watch,
    all_stopped,
    free_port,
    start,
    wait_until_listening,
)
from benchmarks.report import Check, Report, command_line, number
from gateway.asking import CLASS_HEADER
from gateway.clock import LiveClock
from gateway.scenario import WorkloadEntry
from gateway.settings import ConfigError
from gateway.simulation.asks import Stream, opened, prepared
from gateway.simulation.figures import Figures, figures_of
from gateway.simulation.fleet import servers_of
from gateway.simulation.plan import Plan, load
from gateway.simulation.records import Ended, Record, RunFacts
from gateway.simulation.runs import cases_of, run_case
from policies.calibration import CalibrationError
from policies.types import Kind

ROOT = Path(__file__).parents[1]
SCENARIO = Path(__file__).parent / "scenarios" / "fidelity.toml"
QUICK_S = 30.0
POINTS, PERCENT = 3.0, 10.0
READY_S = 30.0
LATE_MS = 20.0
VOCABULARY = range(1000, 30_000)


def specs_of(plan: Plan, seed: int) -> list[ServerSpec]:
    """The scenario's first fleet as emulated servers, with noise of their own."""
    fleet, noise = plan.scenario.fleet[0], Random(f"{seed}/emulated")
    return [
        ServerSpec(
            engine=it.config,
            times=Noisy(it.times, Random(noise.getrandbits(64)), fleet.noise),
            pool=it.entry.pool,
            speed=it.entry.speed,
        )
        for it in servers_of(fleet, plan.data)
    ]


async def emulate(plan: Plan, seed: int, tell: Callable[[str], object]) -> None:
    """The fleet over HTTP until interrupted; told its [[worker]] tables."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    async with EmulatedFleet(specs_of(plan, seed), LiveClock(loop)) as servers:
        tell(servers.toml())
        await stop.wait()


def gateway_config(port: int, entry: WorkloadEntry, workers: str) -> str:
    return f"""\
[server]
port = {port}
[classes.online]
ttft_ms = {entry.ttft_ms}
tpot_ms = {entry.tpot_ms}
patience = {entry.patience}
[log]
level = "error"
requests = false
{workers}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Where the workload goes, and the same as the simulator has it."""

    plan: Plan
    url: str
    vocabulary: range = VOCABULARY
    check: bool = True


class Player:
    """Sends each request at its time and takes the times of its tokens."""

    def __init__(
        self,
        plan: Plan,
        seed: int,
        url: str,
        time: Callable[[], float],
        vocabulary: range = VOCABULARY,
    ) -> None:
        asks = prepared(plan, 1.0, seed)
        self._coming = [(stream, ask) for stream in asks.streams for ask in stream.asks]
        self._room = asks.room
        self._url = url
        self._time = time
        self._vocabulary = vocabulary
        self._random = Random(f"{seed}/prompts")
        self._began = 0.0
        self.records: list[Record] = []
        self._late_ms: list[float] = []

    def late_ms(self) -> float:
        """How late online requests were sent, p99: what the client itself adds to their times. A
        backlog that is there from the beginning is sent as fast as one process can."""
        late = sorted(self._late_ms)
        return late[int(len(late) * 0.99)] if late else 0.0

    async def play(self, patience_s: float) -> None:
        self._coming.sort(key=lambda it: it[1].arrival_s)
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=patience_s)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            await self._ask(http, Ask(0.0, 8, 2), None)
            bodies = [self._body(ask) for _, ask in self._coming]
            self._began = self._time()
            async with asyncio.TaskGroup() as group:
                for (stream, ask), body in zip(self._coming, bodies, strict=True):
                    await asyncio.sleep(max(0.0, self._began + ask.arrival_s - self._time()))
                    group.create_task(self._one(http, stream, ask, body))

    async def _one(
        self, http: aiohttp.ClientSession, stream: Stream, ask: Ask, body: bytes
    ) -> None:
        record = opened(stream, ask, self._now_us(), self._room)[2]
        if stream.entry.kind is Kind.ONLINE:
            self._late_ms.append(record.arrival_us / 1e3 - ask.arrival_s * 1e3)
        self.records.append(record)
        await self._ask(http, ask, record, body, stream.entry.kind)

    async def _ask(
        self,
        http: aiohttp.ClientSession,
        ask: Ask,
        record: Record | None,
        body: bytes = b"",
        kind: Kind = Kind.ONLINE,
    ) -> None:
        headers = {"content-type": "application/json", CLASS_HEADER: str(kind)}
        try:
            async with http.post(
                f"{self._url}/generate", data=body or self._body(ask), headers=headers
            ) as answer:
                last = b""
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        last = line
                        self._token(record)
                if record is not None:
                    self._end(record, answer.status, last)
        except (aiohttp.ClientError, TimeoutError) as error:
            if record is not None:
                record.ended, record.reason = Ended.FAILED, type(error).__name__

    def _token(self, record: Record | None) -> None:
        if record is not None:
            record.last_us = self._now_us()
            record.first_us = record.last_us if record.first_us is None else record.first_us

    @staticmethod
    def _end(record: Record, status: int, last: bytes) -> None:
        if status != 200:
            record.ended, record.reason = Ended.REJECTED, str(status)
            return
        told: dict[str, Any] = orjson.loads(last[6:]) if last else {}
        record.generated = told.get("meta_info", {}).get("completion_tokens", 0)
        whole = record.generated == record.output_tokens
        record.ended = Ended.FINISHED if whole else Ended.FAILED

    def _body(self, ask: Ask) -> bytes:
        return orjson.dumps(
            {
                "input_ids": self._random.choices(self._vocabulary, k=ask.input_tokens),
                "sampling_params": {
                    "max_new_tokens": ask.output_tokens,
                    "ignore_eos": True,
                    "temperature": 0,
                },
                "stream": True,
            }
        )

    def _now_us(self) -> int:
        return round((self._time() - self._began) * 1e6)


def played(site: Played, facts: RunFacts, seed: int, report: Report) -> Figures:
    plan = site.plan
    wait_until_ready(site.url)
    player = Player(plan, seed, site.url, time.perf_counter, site.vocabulary)
    uvloop.run(player.play(plan.scenario.duration_s + plan.scenario.drain_s))
    name = f"seed {seed}: online requests sent late, p99 (more: the machine is too busy to tell)"
    report.checks.append(Check(name=name, value=player.late_ms(), target=LATE_MS, unit="ms"))
    return figures_of(facts, player.records)[0]


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if uvloop.run(_answers(url)):
            return
        time.sleep(0.2)
    raise DidNotStart(f"{url}/health does not answer 200")


async def _answers(url: str) -> bool:
    timeout = aiohttp.ClientTimeout(total=2.0)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.get(f"{url}/health") as answer,
        ):
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def site_of(
    running: list[Running], asked: argparse.Namespace, folder: Path, report: Report
) -> Played:
    """Started here, but for --url."""
    if asked.sglang:
        seconds = QUICK_CALIBRATE_S if asked.quick else CALIBRATE_S
        pair = calibrated_pair(running, folder, seconds=seconds)
        report.notes += pair.notes
        plan = shortened(pair.plan, asked, report)
        url = start_gateway(running, plan, folder, pair.workers)
        return Played(plan=plan, url=url, vocabulary=range(20, pair.vocabulary), check=False)
    plan = shortened(load(asked.scenario, asked.data), asked, report)
    if asked.url:
        return Played(plan=plan, url=asked.url, check=False)
    workers = start_emulated(running, plan, asked, folder)
    return Played(plan=plan, url=start_gateway(running, plan, folder, workers))


def start_emulated(
    running: list[Running], plan: Plan, asked: argparse.Namespace, folder: Path
) -> str:
    """A process of its own; its [[worker]] tables."""
    workers = folder / "workers.toml"
    options = ["--scenario", str(asked.scenario), "--data", str(plan.data)]
    fleet = [sys.executable, "-m", "benchmarks.fidelity", "--emulate", str(workers), *options]
    running.append(start("fleet", fleet, cwd=ROOT))
    wait_for(running[-1], workers)
    return workers.read_text()


def start_gateway(running: list[Running], plan: Plan, folder: Path, workers: str) -> str:
    """A process of its own; its address."""
    config, port = folder / "config.toml", free_port()
    config.write_text(gateway_config(port, plan.scenario.workload[0], workers))
    serve = [sys.executable, "-m", "gateway", "serve", "--config", str(config)]
    running.append(start("gateway", serve, cwd=ROOT))
    wait_until_listening(running[-1], port)
    return f"http://127.0.0.1:{port}"


def wait_for(program: Running, file: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and not program.ended:
        if file.exists() and tomllib.loads(file.read_text()):
            return
        time.sleep(0.1)
    raise DidNotStart(f"{program.name} has not started: {program.last_words()}")


def compare(report: Report, seed: int, simulated: Figures, real: Figures, *, check: bool) -> None:
    table = Table(title=f"seed {seed}: {simulated.submitted} requests", title_justify="left")
    for column in ("", "simulated", "played", "error"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ours, theirs, unit, most in differences(simulated, real):
        error = None if ours is None or theirs is None else _error(ours, theirs, unit)
        shown = [("-" if it is None else number(it)) for it in (ours, theirs)]
        table.add_row(name, *shown, "-" if error is None else f"{number(error)} {unit}")
        if check and most is not None:
            label = f"seed {seed}: error of {name}"
            report.checks.append(Check(name=label, value=error, target=most, unit=unit))
    report.tables.append(table)


Difference = tuple[str, float | None, float | None, str, float | None]


def differences(simulated: Figures, real: Figures) -> list[Difference]:
    """Name, simulated, played, the unit of their difference, and how much of it is accepted."""
    pairs = (simulated, real)
    shares = [
        (name, *(_times_100(getattr(it, key)) for it in pairs), "points", POINTS)
        for name, key in (
            ("TTFT kept, %", "ttft_attained"),
            ("TPOT kept, %", "tpot_attained"),
            ("both kept, %", "attained"),
        )
    ]
    times = [
        (f"{what} p{share}, ms", *(getattr(getattr(it, key), f"p{share}") for it in pairs), "%",
         PERCENT if share == 50 else None)
        for what, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"))
        for share in (50, 90, 99)
    ]  # fmt: skip
    counts = [
        (name, *(float(getattr(it, name)) for it in pairs), "", None)
        for name in ("finished", "rejected", "failed")
    ]
    return [*shares, *times, *counts]


def _times_100(share: float | None) -> float | None:
    return None if share is None else share * 100


def _error(simulated: float, real: float, unit: str) -> float:
    if unit != "%":
        return abs(simulated - real)
    return abs(simulated - real) / real * 100 if real else float("inf")


def shortened(plan: Plan, asked: argparse.Namespace, report: Report) -> Plan:
    scenario = plan.scenario
    if any(entry.kind is not Kind.ONLINE for entry in scenario.workload):
        raise ConfigError("only online workloads are played")
    if not asked.quick:
        return plan
    report.notes.append(f"--quick: {QUICK_S:g} s")
    from_s = min(scenario.warm_up_s, QUICK_S / 3)
    shorter = replace(scenario, duration_s=QUICK_S, warm_up_s=from_s)
    return replace(plan, scenario=shorter)


def measure(asked: argparse.Namespace) -> Report:
    report, watch = Report(title="fidelity"), Watch.begin()
    with all_stopped() as running, tempfile.TemporaryDirectory() as folder:
        site = site_of(running, asked, Path(folder), report)
        for case in cases_of(site.plan)[: asked.seeds or None]:
            outcome, _ = run_case(site.plan, case, with_records=False)
            real = played(site, outcome.facts, case.seed, report)
            compare(report, case.seed, outcome.figures[0], real, check=site.check)
    report.notes.append(watch.note())
    return report


def main() -> int:
    parser = command_line("fidelity", __doc__)
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument("--data", type=Path, help="where the scenario's traces and tables lie")
    parser.add_argument("--seeds", type=int, default=0, help="how many of the scenario's seeds")
    parser.add_argument("--sglang", action="store_true", help="real servers on this CPU")
    parser.add_argument("--url", help="a gateway that is there already; nothing is checked")
    parser.add_argument("--emulate", type=Path, metavar="FILE", help="only run the scenario's "
                        "fleet, and write its [[worker]] tables to FILE")  # fmt: skip
    asked = parser.parse_args()
    try:
        if asked.emulate is not None:
            plan = load(asked.scenario, asked.data)
            uvloop.run(emulate(plan, plan.scenario.seeds[0], asked.emulate.write_text))
            return 0
        report = measure(asked)
    except (CalibrationError, CannotMeasure, ConfigError, DidNotStart) as problem:
        print(problem, file=sys.stderr)
        return 2
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
