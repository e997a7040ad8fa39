"""The servers of `benchmarks.fidelity --sglang`: real ones, and what the simulator is told of them.

A prefill and a decode server are started on this CPU and calibrated. The simulator gets the steps
that the fitted constants predict, the servers' own limits, and the delay of a first token besides
its prefill; nothing is taken from the workload that is played afterwards.
"""

from __future__ import annotations

import asyncio
import csv
import random
import statistics
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop

from backends.calibration_run import Facts, planned
from backends.calibration_run import Plan as CalibrationPlan
from benchmarks.processes import DidNotStart, Running, start
from gateway.calibrate import fit_servers
from gateway.calibrate_live import Asked, Measured, measure_servers
from gateway.clock import LiveClock
from gateway.scenario import ServerEntry
from gateway.simulation.plan import Plan, load
from policies.roofline import CostModel, prefill_batch
from policies.types import Role

SCENARIO = Path(__file__).parent / "scenarios" / "fidelity-sglang.toml"
CALIBRATE_S, QUICK_CALIBRATE_S = 60.0, 35.0
FLEET_PATIENCE_S = 300.0
PROMPTS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (1, 128, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A real pair and what the simulator is told of it."""

    workers: str
    """The [[worker]] tables of a gateway in front of it."""
    plan: Plan
    vocabulary: int
    notes: tuple[str, ...]


def fleet_on_cpu(running: list[Running], tables: Path, roles: Iterable[Role]) -> dict[Role, str]:
    """One server of each role, as `slackwater fleet` starts them."""
    counts = [word for role in roles for word in (f"--{role}", "1")]
    command = [sys.executable, "-m", "gateway", "fleet", "--cpu", *counts]
    program = start("SGLang fleet", [*command, "--output", str(tables)])
    running.append(program)
    deadline = time.monotonic() + FLEET_PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if program.ended:
            raise DidNotStart(f"the SGLang fleet ended: {program.last_words()}")
        if tables.exists() and (known := tomllib.loads(tables.read_text()).get("worker")):
            return {Role(each["role"]): each["url"] for each in known}
    raise DidNotStart(f"no SGLang fleet after {FLEET_PATIENCE_S:.0f} s: {program.last_words()}")


def calibrated_pair(running: list[Running], folder: Path, *, seconds: float) -> Calibrated:
    """Raises DidNotStart, CannotMeasure, CalibrationError."""
    tables = folder / "sglang-workers.toml"
    urls = fleet_on_cpu(running, tables, (Role.PREFILL, Role.DECODE))
    pair = (urls[Role.PREFILL], urls[Role.DECODE])
    measured, facts = _measured(pair, seconds)
    setup, found, _ = fit_servers(measured)
    write_steps(folder / "steps.csv", setup.cost(found.constants))
    overhead_s = statistics.median(measured.overheads_s)
    errors = ", ".join(
        f"{phase} {100 * it.median:.1f} % of {it.count} loads"
        for phase, it in (("prefill", found.prefill), ("decode", found.decode))
        if it is not None
    )
    return Calibrated(
        workers=tables.read_text(),
        plan=told(load(SCENARIO, folder), facts, overhead_s),
        vocabulary=setup.model.vocabulary,
        notes=(
            f"calibrated in {seconds:g} s; median error of the fit: {errors}",
            f"a first token takes {1e3 * overhead_s:.1f} ms besides its prefill",
        ),
    )


def _measured(pair: tuple[str, str], seconds: float) -> tuple[Measured, tuple[Facts, Facts]]:
    told_facts: list[tuple[Facts, Facts]] = []

    def as_usual(prefill: Facts, decode: Facts) -> CalibrationPlan:
        told_facts.append((prefill, decode))
        return planned(prefill, decode)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        asked = Asked(targets=(pair,), device="cpu", seconds=seconds)
        clock, rng = LiveClock(runner.get_loop()), random.Random(1)
        measured = runner.run(measure_servers(asked, clock, rng, _silent, as_usual))
    return measured, told_facts[0]


def _silent(_share: float, _what: str) -> None:
    return


def write_steps(path: Path, cost: CostModel) -> None:
    """A table such as the simulator reads from measurements, from a model's predictions."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("system", "model", "tp", "phase", "batch_size", "ctx_len", "latency_ms"))
        for phase, batch, tokens, seconds in _steps(cost):
            out.writerow(("cpu", "tiny", 1, phase, batch, tokens, 1e3 * seconds))


def _steps(cost: CostModel) -> Iterator[tuple[str, int, int, float]]:
    for tokens in PROMPTS:
        yield "prefill", 1, tokens, cost.cost(prefill_batch([(tokens, 0)])).seconds
    for batch in BATCHES:
        for tokens in CONTEXTS:
            yield "decode", batch, tokens, cost.decode(batch, batch * tokens).seconds


def told(plan: Plan, facts: tuple[Facts, Facts], overhead_s: float) -> Plan:
    """The scenario's servers with the limits that the real ones have."""
    fleet = plan.scenario.fleet[0]
    servers = tuple(
        _like(entry, facts[entry.role is Role.DECODE], overhead_s) for entry in fleet.server
    )
    scenario = replace(plan.scenario, fleet=(replace(fleet, server=servers),))
    return replace(plan, scenario=scenario)


def _like(entry: ServerEntry, facts: Facts, overhead_s: float) -> ServerEntry:
    return replace(
        entry,
        kv_tokens=facts.kv_tokens,
        max_running=facts.max_running,
        chunk_tokens=facts.chunk_tokens,
        context_tokens=facts.context_tokens,
        ingest_ms=max(0.0, 1e3 * overhead_s - entry.link_latency_ms),
    )
