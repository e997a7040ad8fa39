"""The shape of the batch gateway people's benchmark: waves of chat above batch jobs.

Servers of another speed get waves and targets of the same shape: so many requests to the second of
a full-speed server's time.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from benchmarks.coloc_systems import TABLE
from gateway.config import Classes, Cost, Limits, Online, Policies
from gateway.scenario import FleetEntry, PolicyEntry, Scenario, ServerEntry, WorkloadEntry
from gateway.simulation.figures import rank
from gateway.simulation.records import Record
from policies.types import Kind, Role

HIGH_PER_S, LOW_PER_S = 15.0, 1.0
PROMPT_TOKENS, ANSWER_TOKENS = 512, 128
JOBS = {"30 min": 1800.0, "2 h": 7200.0, "24 h": 86_400.0}
REPLICAS = 2
TTFT_MS, TPOT_MS = 150.0, 9.4
"""What the gateway is told: a token a fifth above what chat alone takes (7.8 ms)."""
MODEL, DEVICE = "Llama-3.1-8B", "h100"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Theirs, where nothing else is said."""

    cycles: int = 3
    phase_s: float = 90.0
    rows: int = 1000
    """Of each of the three batch jobs."""
    speed: float = 1.0
    """Of the servers, beside what was measured on an H100."""

    @property
    def duration_s(self) -> float:
        return 2 * self.cycles * self.phase_s

    @property
    def ttft_ms(self) -> float:
        return TTFT_MS / self.speed

    @property
    def tpot_ms(self) -> float:
        return TPOT_MS / self.speed

    def is_high(self, at_s: float) -> bool:
        return int(at_s // self.phase_s) % 2 == 0

    def waves(self, random: Random) -> list[float]:
        """When chat requests come: Poisson at the rate of each phase."""
        times: list[float] = []
        for phase in range(2 * self.cycles):
            now_s, end_s = phase * self.phase_s, (phase + 1) * self.phase_s
            rate = (HIGH_PER_S if self.is_high(now_s) else LOW_PER_S) * self.speed
            while (now_s := now_s + random.expovariate(rate)) < end_s:
                times.append(now_s)
        return times

    def __str__(self) -> str:
        high, low = HIGH_PER_S * self.speed, LOW_PER_S * self.speed
        return (
            f"{REPLICAS} unified servers, {MODEL} on {DEVICE} at {self.speed:g} of its speed; "
            f"{self.cycles} times {self.phase_s:g} s at {high:g}/s and {self.phase_s:g} s at "
            f"{low:g}/s; {len(JOBS) * self.rows:,} batch requests, there from the beginning"
        )


def write_waves(path: Path, times: Sequence[float]) -> None:
    with path.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(("timestamp", "input_tokens", "output_tokens"))
        rows.writerows((f"{at:.6f}", PROMPT_TOKENS, ANSWER_TOKENS) for at in times)


def fleet(shape: Shape) -> FleetEntry:
    server = ServerEntry(role=Role.UNIFIED, count=REPLICAS, priority=True, speed=shape.speed)
    return FleetEntry(device=DEVICE, table=TABLE, server=(server,))


def scenario(policy: PolicyEntry, trace: str, shape: Shape, *, batch: bool) -> Scenario:
    chat = WorkloadEntry(
        name="chat",
        arrivals="trace",
        trace=trace,
        max_tokens=ANSWER_TOKENS,
        ttft_ms=shape.ttft_ms,
        tpot_ms=shape.tpot_ms,
        patience=100.0,
    )
    jobs = tuple(
        WorkloadEntry(
            name=f"batch {name}",
            kind=Kind.OFFLINE,
            arrivals="backlog",
            count=shape.rows,
            input_median=PROMPT_TOKENS,
            input_sigma=0.0,
            output_median=ANSWER_TOKENS,
            output_sigma=0.0,
            max_tokens=ANSWER_TOKENS,
            window_s=window_s,
        )
        for name, window_s in JOBS.items()
    )
    return Scenario(
        fleet=(fleet(shape),),
        workload=(chat, *(jobs if batch else ())),
        policy=(told(policy, shape),),
        duration_s=shape.duration_s,
        drain_s=30.0,
    )


def _policy(name: str, **keys: object) -> PolicyEntry:
    entry = PolicyEntry(
        name=name,
        limits=Limits(max_queued=1_000_000),
        policies=Policies(order="fcfs", pools="none"),
    )
    return replace(entry, **keys)  # type: ignore[arg-type]  # checked where the scenario is planned


OURS = _policy("ours", policies=Policies(), cost=Cost(model=MODEL, device=DEVICE))
ALONE = _policy("chat alone")
SYSTEMS = (
    _policy("as they come", tells_classes=False),
    _policy("online first"),
    _policy("AIMD", door="aimd"),
    OURS,
)


def told(policy: PolicyEntry, shape: Shape) -> PolicyEntry:
    """Only ours is told the targets: the others have no use for them."""
    if policy.name != OURS.name:
        return policy
    targets = Online(ttft_ms=shape.ttft_ms, tpot_ms=shape.tpot_ms)
    return replace(policy, classes=Classes(online=targets))


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


def figures(records: Sequence[Record], shape: Shape) -> Waved:
    chat = [it for it in records if it.kind is Kind.ONLINE and shape.is_high(it.arrival_us / 1e6)]
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
