"""What the co-location benchmark compares, on which servers, under which traffic."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.coloc_budget import BUDGETS
from gateway.config import Admission, Classes, Colocation, Cost, Limits, Online, Policies
from gateway.scenario import FleetEntry, PolicyEntry, ServerEntry, WorkloadEntry
from policies.types import Kind, Pool, Role

MODEL, DEVICE = "Llama-3.1-8B", "a100"
TABLE = "profiles/aiconfigurator/step_times_sglang_bf16.csv.gz"
PREFILLS, DECODES = 2, 2
TTFT_MS = 5000.0
"""The authors' own."""
CHAT = {
    "input_median": 400.0,
    "input_sigma": 0.8,
    "input_max": 8192,
    "output_median": 250.0,
    "output_sigma": 0.6,
    "output_max": 1500,
}
"""Short questions and long answers."""
ARXIV = "traces/vidur_arxiv_summarization_lengths.csv.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One online trace; the windows are those in which it moves most."""

    key: str
    about: str
    online: tuple[WorkloadEntry, ...]
    tpot_ms: float
    """The authors' 40 ms become what online alone takes 50 to 60 % of, half of the time."""
    warm_up_s: float
    duration_s: float
    strict: int
    """Decode servers that online needs in its busiest minute: the others are relaxed."""


def _online(name: str, tpot_ms: float, **keys: object) -> WorkloadEntry:
    base = WorkloadEntry(name=name, ttft_ms=TTFT_MS, tpot_ms=tpot_ms)
    return replace(base, **keys)  # type: ignore[arg-type]  # checked where the scenario is planned


def _traffic(key: str, about: str, *, tpot_ms: float, strict: int, duration_s: float,
             **streams: dict[str, object]) -> Traffic:  # fmt: skip
    return Traffic(
        key=key,
        about=about,
        online=tuple(_online(name, tpot_ms, **keys) for name, keys in streams.items()),
        tpot_ms=tpot_ms,
        warm_up_s=60.0,
        duration_s=duration_s,
        strict=strict,
    )


TRAFFIC = (
    _traffic(
        "a",
        "Azure code 2023, minutes 13 to 22, 45 % of the requests",
        tpot_ms=22.0,
        strict=1,
        duration_s=540.0,
        code={
            "arrivals": "trace",
            "trace": "traces/azure_2023_code.csv.gz",
            "from_s": 780.0,
            "keep_share": 0.45,
        },
    ),
    _traffic(
        "b",
        "Azure conversation 2023, minutes 26 to 32",
        tpot_ms=24.0,
        strict=1,
        duration_s=360.0,
        conversation={
            "arrivals": "trace",
            "trace": "traces/azure_2023_conv.csv.gz",
            "from_s": 1560.0,
        },
    ),
    _traffic(
        "c",
        "chat at 4 requests/s, and bursts to 26 for 20 s in the mean, 60 s apart",
        tpot_ms=24.0,
        strict=2,
        duration_s=540.0,
        chat={"arrivals": "poisson", "rate": 4.0, **CHAT},
        bursts={
            "arrivals": "bursts",
            "rate": 5.5,
            "burst_factor": 1e6,
            "burst_s": 20.0,
            "calm_s": 60.0,
            **CHAT,
        },
    ),
)


def offline(rate: float) -> WorkloadEntry:
    return WorkloadEntry(
        name="batch", kind=Kind.OFFLINE, arrivals="poisson", rate=rate, lengths=ARXIV
    )


def _fleet(name: str, *servers: ServerEntry) -> FleetEntry:
    return FleetEntry(
        name=name, model=MODEL, device=DEVICE, table=TABLE, table_system="a100_sxm", server=servers
    )


def _servers(role: Role, count: int, pool: Pool, *, priority: bool) -> ServerEntry:
    return ServerEntry(name=f"{pool}-{role}", role=role, count=count, pool=pool, priority=priority)


def fleets(strict: int) -> tuple[FleetEntry, ...]:
    """The same servers for everybody; they differ by their labels and SGLang's own flags."""

    def split(name: str, strict: int, *, priority: bool) -> FleetEntry:
        counts = {Pool.STRICT: strict, Pool.RELAXED: DECODES - strict}
        decodes = [
            _servers(Role.DECODE, count, pool, priority=priority)
            for pool, count in counts.items()
            if count
        ]
        prefill = _servers(Role.PREFILL, PREFILLS, Pool.STRICT, priority=priority)
        return _fleet(name, prefill, *decodes)

    return (
        split("plain", DECODES, priority=False),
        split("by priority", DECODES, priority=True),
        split("pools", strict, priority=True),
        _fleet(
            "unified",
            _servers(Role.UNIFIED, PREFILLS + DECODES, Pool.STRICT, priority=True),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    key: str
    about: str
    policy: PolicyEntry
    is_ours: bool = False
    budgets: tuple[float, ...] = ()
    """Searched instead of the load, which is a backlog then."""


_BACKLOG = Limits(max_queued=1_000_000)
_COST = Cost(model=MODEL, device=DEVICE)
_PD = Policies(order="fcfs", pools="none")
_LATE = Admission(prefill_chunks=1)
"""The best of 1, 2 and 8 chunks of work at each prefill server, for each of the peers."""


def _peer(key: str, about: str, fleet: str = "by priority", **keys: object) -> System:
    entry = PolicyEntry(name=key, fleet=fleet, policies=_PD, limits=_BACKLOG, admission=_LATE)
    return System(
        key=key,
        about=about,
        policy=replace(entry, **keys),  # type: ignore[arg-type]  # checked as above
    )


def _budgeted(key: str, about: str, fleet: str, admission: Admission) -> System:
    peer = _peer(key, about, fleet=fleet, door="latency-budget", admission=admission)
    return replace(peer, budgets=BUDGETS)


def _own(key: str, about: str, **keys: object) -> System:
    entry = PolicyEntry(
        name=key, fleet="pools", policies=Policies(pools="latency"), limits=_BACKLOG, cost=_COST
    )
    return System(
        key=key,
        about=about,
        is_ours=True,
        policy=replace(entry, **keys),  # type: ignore[arg-type]  # checked as above
    )


PEERS = (
    _peer("v0", "offline sent as if online", fleet="plain", tells_classes=False),
    _peer("v1", "online first, in the gateway and in the servers"),
    _peer("SMG classes", "v1 behind slots for each class", door="priority-classes"),
    _peer("AIMD", "v1 behind a batch processor's window", door="aimd"),
)
BESIDE = (
    _budgeted("HyGen", "unified servers, a latency budget", "unified", Admission()),
    _budgeted("HyGen, P/D", "the same rule before v1's servers", "by priority", _LATE),
)
OURS = _own("ours", "two pools; offline work is lent what online work leaves, and taken back")
ABLATIONS = (
    _own("no preemption", "what runs may end", policies=Policies(preempt="none")),
    _own("no gating", "offline prompts go as they come", colocation=Colocation(gate=False)),
    _own("no head-room", "lent to the last millisecond", colocation=Colocation(headroom=False)),
    _own("with pull", "strict servers take running work over", colocation=Colocation(pull=True)),
)


def told(policy: PolicyEntry, traffic: Traffic) -> PolicyEntry:
    """The gateway's targets are those of the traffic."""
    targets = Online(ttft_ms=TTFT_MS, tpot_ms=traffic.tpot_ms)
    return replace(policy, classes=Classes(online=targets))
