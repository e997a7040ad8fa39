"""Small scenarios for tests: a fleet, a workload and what is different about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gateway.scenario import (
    FleetEntry,
    GatewayEntry,
    PolicyEntry,
    Scenario,
    ServerEntry,
    WorkloadEntry,
)
from gateway.simulation.plan import Plan, planned
from gateway.simulation.world import Case, Ran, World
from policies.types import Role

NOWHERE = Path("/nonexistent")
PAIR = (
    ServerEntry(role=Role.PREFILL, kv_tokens=50_000),
    ServerEntry(role=Role.DECODE, kv_tokens=50_000),
)
UNIFIED = (ServerEntry(role=Role.UNIFIED, kv_tokens=50_000),)
CHAT = WorkloadEntry(
    name="chat", rate=5.0, input_median=500, input_max=4000, output_median=40, output_max=200
)


def fleet(*servers: ServerEntry, **more: Any) -> FleetEntry:
    return FleetEntry(server=servers or PAIR, **more)


def plan(*workloads: WorkloadEntry, servers: tuple[ServerEntry, ...] = PAIR, **more: Any) -> Plan:
    values: dict[str, Any] = {
        "seeds": (1,),
        "duration_s": 10.0,
        "drain_s": 60.0,
        "fleet": (fleet(*servers),),
        "workload": workloads or (CHAT,),
    }
    data = more.pop("data", NOWHERE)
    return planned(Scenario(**values | more), data)


def ran(of: Plan, *, seed: int = 1, load: float = 1.0, policy: PolicyEntry | None = None) -> Ran:
    case = Case(policy=policy or of.scenario.policy[0], load=load, seed=seed)
    return World(of, case).run()


def slow_gateway(ms: float) -> GatewayEntry:
    return GatewayEntry(request_ms=ms, answer_ms=ms)
