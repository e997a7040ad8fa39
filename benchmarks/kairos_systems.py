"""What the Kairos benchmark compares, on which machines, under which traffic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

from benchmarks.kairos_trace import (
    DECODE_S,
    DECODE_TOKEN_S,
    PREFILL_PAIR_S,
    PREFILL_TOKEN_S,
    TPOT_S,
    TTFT_S,
    Law,
    rows_of,
    write_trace,
)
from gateway.config import Admission, Policies
from gateway.scenario import (
    BadRows,
    FitEntry,
    FleetEntry,
    GatewayEntry,
    PolicyEntry,
    Scenario,
    ServerEntry,
    WorkloadEntry,
)
from gateway.simulation.oracles import NO_ORACLE
from gateway.simulation.plan import Plan, planned
from policies.registry import DISPLACE, ORDER, PLACE
from policies.types import Kind, Role

ORACLE = "srpf-oracle"
BASELINE = "FCFS, continuous batching"
PRINTED, REPAIRED, RESCUED = "Kairos as printed", "salvage + slack", "rescue + slack"
STOCK, ENGINE, PATCHED = "stock", "engine setting", "patched"
NOBODY = "what nobody has"
"""An order that is told how long answers will be: a bound, not a system."""
PATIENT = 1e4
"""Nobody is turned away, as in the paper: every prompt is served, however late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row: what decides, and what that needs."""

    name: str
    needs: str = STOCK
    order: str = "fcfs"
    oracle: str = NO_ORACLE
    displace: str = "none"
    hold: str = "none"
    held: int = 0
    """So many chunks are sent ahead and the other prompts wait in the gateway; 0: all are sent.

    What is sent has its memory on the decode server from then on, also while it waits for prefill.
    """
    place: str = "least-work"
    schedule_policy: str = "fcfs"
    packing: str = "all"
    prefill_order: str = "fcfs"
    unified: bool = False
    door: str = "open"
    tells_classes: bool = True
    priority: bool = False
    """Servers that take online prompts first."""

    def fleet(self, like: FleetEntry) -> FleetEntry:
        mode = PATCHED if self.needs == PATCHED else STOCK
        servers = tuple(
            replace(
                it,
                schedule_policy=self.schedule_policy,
                priority=self.priority,
                role=Role.UNIFIED if self.unified else it.role,
            )
            for it in like.server
        )
        if self.unified:
            servers = tuple(
                replace(it, name=f"unified-{number}") for number, it in enumerate(servers)
            )
        return replace(
            like,
            name=self.name,
            mode=mode,
            packing=self.packing,
            prefill_order=self.prefill_order,
            server=servers,
        )

    def policy(self) -> PolicyEntry:
        chunks = self.held or 1_000_000
        return PolicyEntry(
            name=self.name,
            fleet=self.name,
            oracle=self.oracle,
            door=self.door,
            tells_classes=self.tells_classes,
            policies=Policies(
                order=self.order,
                displace=self.displace,
                hold=self.hold,
                place=self.place,
                pools="none",
            ),
            admission=Admission(prefill_chunks=chunks, kv_watermark=1.0),
        )


class Ahead(TypedDict):
    """How the gateway feeds an engine that decides for itself."""

    held: int
    order: str


def at_the_gateway() -> Iterator[System]:
    """Every order that the gateway knows, and those that displace long prompts with it."""
    for order in ORDER:
        if order != "fcfs":
            yield System(name=f"gateway {order}", order=order, held=2)
    for displace in DISPLACE:
        if displace != "none":
            for order in ("kairos", "salvage") if displace == "by-cost" else ("salvage",):
                name = f"gateway {order}, displaced {displace}"
                yield System(name=name, order=order, displace=displace, held=2)


HELD: Ahead = {"held": 24, "order": "salvage"}
"""Room for the longest prompt under way and for those that displace it; the backlog waits here."""
SYSTEMS: tuple[System, ...] = (
    System(name=BASELINE),
    System(name="FCFS, unified servers", unified=True),
    System(name="SGLang lof", needs=ENGINE, schedule_policy="lof"),
    System(name="SGLang hrrn", needs=ENGINE, schedule_policy="hrrn"),
    System(
        name="SGLang shortest-prefill-first",
        needs=ENGINE,
        schedule_policy="shortest-prefill-first",
    ),
    *at_the_gateway(),
    System(name="gateway salvage, slack admission", order="salvage", hold="slack", held=2),
    System(name=f"gateway {ORACLE}", needs=NOBODY, oracle=ORACLE, held=2),
    System(name="Kairos, prefill only", needs=PATCHED, prefill_order="kairos"),
    System(name="Kairos, decode only", needs=PATCHED, packing="kairos"),
    System(name=PRINTED, needs=PATCHED, prefill_order="kairos", packing="kairos"),
    System(name="shortest in chunks", needs=PATCHED, prefill_order="shortest"),
    System(name="salvage, prefill only", needs=PATCHED, prefill_order="salvage", **HELD),
    System(name="rescue, prefill only", needs=PATCHED, prefill_order="rescue", **HELD),
    System(name="slack, decode only", needs=PATCHED, packing="slack"),
    System(name=REPAIRED, needs=PATCHED, prefill_order="salvage", packing="slack", **HELD),
    System(name=RESCUED, needs=PATCHED, prefill_order="rescue", packing="slack", **HELD),
)

PLACED: tuple[System, ...] = (
    System(name=BASELINE),
    *(System(name=f"place {place}", place=place) for place in PLACE if place != "least-work"),
    System(name="salvage, place length-split", order="salvage", held=2, place="length-split"),
    System(name="slack, decode only", needs=PATCHED, packing="slack"),
    System(name=RESCUED, needs=PATCHED, prefill_order="rescue", packing="slack", **HELD),
    System(
        name="rescue + slack, place length-split",
        needs=PATCHED,
        prefill_order="rescue",
        packing="slack",
        **HELD,
        place="length-split",
    ),
)
"""Where there are several servers of a role, the choice among them counts too."""


V1: Ahead = {"held": 2, "order": "fcfs"}
"""Of the peers' classes of requests."""
MIXED: tuple[System, ...] = (
    System(name=BASELINE, tells_classes=False),
    System(name="xLLM v0, base P/D", tells_classes=False, **V1),
    System(name="xLLM v1, online first", priority=True, **V1),
    System(name="SMG's classes", priority=True, door="priority-classes", **V1),
    System(name="AIMD", priority=True, door="aimd", **V1),
    System(name="HyGen-like budget", priority=True, door="latency-budget", **V1),
    System(name="gateway salvage", priority=True, order="salvage", held=2),
    System(name="gateway salvage, slices", order="salvage", held=2, displace="cheapest"),
)
"""Where offline work is there too; the first one does not know which it is."""


def minimax(law: Law, *, straggler: bool, pairs: int = 1) -> FleetEntry:
    """MiniMax-M2.5 on four H200 for prefill and four for decode, by the fits to the paper."""
    server = ServerEntry(
        count=pairs, kv_tokens=2_000_000, max_running=512, link_gb_s=400.0, ingest_ms=2.0
    )
    return FleetEntry(
        straggler=straggler,
        noise=0.03,
        fit=FitEntry(
            prefill_token_us=PREFILL_TOKEN_S * 1e6,
            prefill_pair_ns=PREFILL_PAIR_S * 1e9,
            decode_ms=DECODE_S * 1e3,
            decode_token_us=DECODE_TOKEN_S * 1e6,
            decode_experts_ms=law.experts_s * 1e3,
        ),
        server=(
            replace(server, role=Role.PREFILL),
            replace(server, role=Role.DECODE),
        ),
    )


def llama() -> FleetEntry:
    """Llama-3.1-8B in bf16, measured steps of an H100."""
    return FleetEntry(
        table="profiles/aiconfigurator/step_times_sglang_bf16.csv.gz",
        server=(ServerEntry(role=Role.PREFILL), ServerEntry(role=Role.DECODE, max_running=512)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One table: a workload on a machine, at the rates that are asked for."""

    name: str
    fleet: FleetEntry
    workload: WorkloadEntry
    rates: tuple[float, ...]
    """As multiples of the workload's own pace; of the long tail, requests per second."""
    law: Law | None = None
    """Where the trace is made here, anew for each seed."""
    duration_s: float = 0.0
    offline: tuple[WorkloadEntry, ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)

    def plan(self, system: System, rate: float, seed: int, folder: Path) -> Plan:
        workload, data = self.workload, folder
        if self.law is not None:
            workload = replace(
                workload, arrivals="trace", trace=f"long-tail-{self.name}-{seed}.csv"
            )
            if not (path := folder / workload.trace).is_file():
                write_trace(rows_of(self.law, seed), path)
        else:
            data = self.files["data"]
        scenario = Scenario(
            name=self.name,
            seeds=(seed,),
            drain_s=20_000.0,
            duration_s=self.duration_s,
            gateway=GatewayEntry(tick_ms=1_000.0),
            fleet=(system.fleet(self.fleet),),
            workload=(
                replace(workload, rate_scale=workload.rate_scale * rate),
                *self.offline,
            ),
            policy=(system.policy(),),
        )
        return planned(scenario, data)


def long_tail(name: str, law: Law, *, straggler: bool, rates: Sequence[float]) -> Traffic:
    return Traffic(
        name=name,
        fleet=minimax(law, straggler=straggler),
        workload=targets(TTFT_S * 1e3, TPOT_S * 1e3),
        rates=tuple(rates),
        law=law,
    )


def on_two_pairs(traffic: Traffic) -> Traffic:
    """Twice the servers, for a share of the time."""
    servers = tuple(replace(it, count=2) for it in traffic.fleet.server)
    return replace(
        traffic,
        name=f"{traffic.name}, two pairs",
        fleet=replace(traffic.fleet, server=servers),
        duration_s=traffic.duration_s / 2,
    )


def beside_offline(traffic: Traffic) -> Traffic:
    """As many clients as keep a batch busy, each with the next prompt once it has its answer."""
    batch = WorkloadEntry(
        name="batch",
        kind=Kind.OFFLINE,
        arrivals="closed",
        clients=8,
        input_median=2_400.0,
        input_sigma=0.4,
        input_max=8_000,
        output_median=260.0,
        output_sigma=0.4,
        output_max=1_000,
        max_tokens=1_024,
    )
    return replace(
        traffic,
        name=f"{traffic.name}, mixed",
        offline=(batch,),
        duration_s=traffic.duration_s / 2,
    )


def targets(ttft_ms: float, tpot_ms: float, trace: str = "", **more: float) -> WorkloadEntry:
    return WorkloadEntry(
        name="requests",
        arrivals="trace" if trace else "poisson",
        trace=trace,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        patience=PATIENT,
        max_tokens=4096,
        **more,  # type: ignore[arg-type]  # numbers of the entry
    )


def replayed(law: Law, data: Path) -> list[Traffic]:
    """Real traces; targets by the recipe: the longest prompt's own prefill, 1.2 mean steps."""
    files = {"data": data}
    mooncake = targets(
        TTFT_S * 1e3, TPOT_S * 1e3, "traces/mooncake_fast25_conversation.csv.gz", tick_s=3.0
    )
    conversation = targets(420.0, 14.0, "traces/azure_2023_conv.csv.gz")
    code = targets(210.0, 10.0, "traces/azure_2023_code.csv.gz")
    return [
        Traffic(
            name="Mooncake conversation",
            fleet=minimax(law, straggler=True),
            workload=replace(mooncake, too_large=BadRows.SKIP),
            rates=(0.3, 0.35, 0.375, 0.4, 0.45),
            duration_s=600.0,
            files=files,
        ),
        Traffic(
            name="Azure conversation",
            fleet=llama(),
            workload=conversation,
            rates=(5.0, 5.5, 6.0, 6.25, 6.5),
            duration_s=90.0,
            files=files,
        ),
        Traffic(
            name="Azure code",
            fleet=llama(),
            workload=code,
            rates=(0.5, 0.75, 1.0, 1.25, 1.5),
            duration_s=900.0,
            files=files,
        ),
    ]
