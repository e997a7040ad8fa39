"""The fleets and loads on which ratio policies are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from backends.workload import Ask, Trace, read_trace
from gateway.config import Admission, Cost, Policies, RatioSettings
from gateway.planning import Mode
from gateway.scenario import (
    FitEntry,
    FleetEntry,
    GatewayEntry,
    PolicyEntry,
    Scenario,
    ServerEntry,
    Sweep,
    WorkloadEntry,
)
from gateway.simulation.plan import Plan, Source, planned
from policies.types import Role

MODEL, DEVICE = "Llama-3.1-8B", "h100"
TABLE = "profiles/aiconfigurator/step_times_sglang_bf16.csv.gz"
GPUS = 8
TTFT_MS, TPOT_MS = 2000.0, 25.0
"""Of the dynamic loads."""
CLOSED_SERVERS = 6
CLOSED_TTFT_MS, CLOSED_TPOT_MS = 1500.0, 50.0
"""The targets are the paper's."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Where the closed loop runs."""

    title: str
    model: str
    """A known name, or a config.json."""
    device: str
    tp: int = 1
    fit: FitEntry = dataclasses.field(default_factory=FitEntry)
    context_tokens: int = 131_072
    input_max: int = 8192
    output_max: int = 2048
    clients: tuple[int, ...]
    quick: tuple[int, ...] = ()
    """With --quick, which leaves it out where there are none."""

    def fleet(self, name: str, entries: Iterable[ServerEntry]) -> FleetEntry:
        servers = tuple(
            dataclasses.replace(it, context_tokens=self.context_tokens) for it in entries
        )
        plain = fleet(name, servers, self.model, self.tp)
        return dataclasses.replace(plain, fit=self.fit, device=self.device)

    def split(self, prefills: int, decodes: int) -> FleetEntry:
        entries = (
            servers(Role.PREFILL, prefills, SWITCH_S),
            servers(Role.DECODE, decodes, SWITCH_S),
        )
        return self.fleet(f"{prefills}P{decodes}D", entries)


PROMPT_HEAVY = Closed(
    title="70B, tp 4 on H100",
    model="Llama-3.1-70B",
    device=DEVICE,
    tp=4,
    clients=(8, 128, 256, 320, 392, 448, 512),
    quick=(256,),
)
"""The size of the paper's Llama: prompts are what takes time, and memory is plenty."""
_KNEES = tuple(range(64, 136, 8))
"""Where the curves bend, every eighth number of clients, as in the paper."""
ANSWER_HEAVY = Closed(
    title="OPT-13B on A100",
    model="Llama-2-13b",
    device="a100",
    fit=FitEntry(
        prefill_ms=18.10,
        prefill_token_us=101.9,
        prefill_pair_ns=14.24,
        decode_ms=19.97,
        decode_token_us=0.627,
        decode_sequence_us=38.5,
    ),
    context_tokens=2048,
    input_max=1500,
    output_max=512,
    clients=(8, 32, *_KNEES, 160, 256, 392),
)
"""DOPD was measured against DistServe on OPT-30B. OPT models have many KV bytes a token: few
sequences fit, and answers are what takes time. DistServe's authors have fitted their engine's steps
on the next smaller one and on the next larger one; Llama-2-13b has the smaller one's layers, heads
and size."""
LARGER = dataclasses.replace(
    ANSWER_HEAVY,
    title="OPT-66B, tp 4 on A100",
    model=str(Path(__file__).parent / "models" / "opt-66b-shaped.json"),
    tp=4,
    fit=FitEntry(
        prefill_ms=29.44,
        prefill_token_us=151.4,
        prefill_pair_ns=16.63,
        decode_ms=30.76,
        decode_token_us=0.452,
        decode_sequence_us=63.3,
    ),
    clients=(8, 32, *_KNEES, 136, 160, 256),
    quick=(104, 128),
)
"""Its steps alone take more than half of the TPOT target: what comes between them hurts more."""
WORLDS = (PROMPT_HEAVY, ANSWER_HEAVY, LARGER)
SWITCH_S, RELAUNCH_S = 5.0, 45.0
PAPER_INTERVAL_S = 10.0
"""At which DOPD's authors ran their own and Dynamo's planners."""


def servers(role: Role, count: int, switch_s: float, *, parked: bool = False) -> ServerEntry:
    return ServerEntry(
        name="spare" if parked else "",
        role=role,
        count=count,
        role_switch_s=switch_s,
        parked=parked,
    )


def fleet(name: str, entries: Iterable[ServerEntry], model: str = MODEL, tp: int = 1) -> FleetEntry:
    return FleetEntry(
        name=name,
        model=model,
        device=DEVICE,
        tp=tp,
        table=TABLE,
        table_model=f"meta-llama/Meta-{model}",
        launch_s=RELAUNCH_S,
        server=tuple(entries),
    )


def split(prefills: int, decodes: int, switch_s: float = SWITCH_S) -> FleetEntry:
    """All of them run all the time."""
    entries = (
        servers(Role.PREFILL, prefills, switch_s),
        servers(Role.DECODE, decodes, switch_s),
    )
    return fleet(f"{prefills}P{decodes}D", entries)


def elastic_name(switch_s: float) -> str:
    return f"elastic, switch {switch_s:g} s"


def elastic(switch_s: float) -> FleetEntry:
    """Half of it runs at the beginning."""
    quarter = GPUS // 4
    entries = (
        servers(Role.PREFILL, quarter, switch_s),
        servers(Role.DECODE, quarter, switch_s),
        servers(Role.DECODE, GPUS - 2 * quarter, switch_s, parked=True),
    )
    return fleet(elastic_name(switch_s), entries)


OURS = "dopd+"
"""With the order that keeps most targets while a change has not taken effect; theirs come first,
first served, as in Dynamo and DistServe."""


def controlled(
    name: str, fleet_name: str, policy: str, cost: Cost, *, order: str = "", headroom: float = 1.0
) -> PolicyEntry:
    ratio = RatioSettings(policy=policy, mode=Mode.ACT, headroom=headroom)
    if policy != OURS:
        ratio = dataclasses.replace(ratio, interval_s=PAPER_INTERVAL_S)
    order = order or ("salvage" if policy == OURS else "fcfs")
    return PolicyEntry(
        name=name, fleet=fleet_name, policies=Policies(order=order), ratio=ratio, cost=cost
    )


# (i) The closed loop.


def closed_plan(
    data: Path, world: Closed, clients: Sequence[int], duration_s: float, warm_up_s: float
) -> Plan:
    count = CLOSED_SERVERS
    unified = ServerEntry(role=Role.UNIFIED, count=count)
    splits = [world.split(n, count - n) for n in range(1, count)]
    middle = f"{count // 2}P{count - count // 2}D"
    plain = Policies(order="fcfs", place="round-robin", pools="none")
    at_once = Admission(prefill_chunks=1_000_000, prefill_cap_tokens=10**9)
    cost = Cost(model=world.model, device=world.device, tp=world.tp)
    policies = [
        PolicyEntry(name="unified", fleet="unified", cost=cost),
        PolicyEntry(
            name="DistServe-like", fleet=middle, policies=plain, admission=at_once, cost=cost
        ),
        *(PolicyEntry(name=f"static {it.name}", fleet=it.name, cost=cost) for it in splits),
        controlled("dopd", middle, "dopd", cost),
        controlled("dopd+", middle, "dopd+", cost),
    ]
    workload = WorkloadEntry(
        name="closed",
        arrivals="closed",
        clients=1,
        input_median=900.0,
        input_sigma=0.5,
        input_max=world.input_max,
        output_median=200.0,
        output_sigma=0.64,
        output_max=world.output_max,
        max_tokens=world.output_max,
        ttft_ms=CLOSED_TTFT_MS,
        tpot_ms=CLOSED_TPOT_MS,
        patience=40.0,
    )
    scenario = Scenario(
        name="closed loop",
        seeds=(1,),
        warm_up_s=warm_up_s,
        duration_s=duration_s,
        drain_s=60.0,
        fleet=(world.fleet("unified", [unified]), *splits),
        workload=(workload,),
        policy=tuple(policies),
        sweep=Sweep(values=tuple(float(count) for count in clients)),
    )
    return planned(scenario, data)


# (ii) Loads whose shape shifts.


def _stretched(
    rows: Sequence[Ask], start_s: float, length_s: float, rate_scale: float, turned: float
) -> Trace:
    """At another pace, from `start_s` on; the share `turned` of the recording comes last."""
    whole_s = rows[-1].arrival_s
    asks = []
    for row in rows:
        at_s = (row.arrival_s - turned * whole_s) % whole_s / rate_scale
        if at_s < length_s:
            asks.append(row._replace(arrival_s=start_s + at_s))
    asks.sort(key=lambda it: it.arrival_s)
    return Trace(Path("shifted"), tuple(asks))


def _phase(name: str, trace: Trace) -> Source:
    entry = WorkloadEntry(
        name=name,
        arrivals="trace",
        trace=name,
        ttft_ms=TTFT_MS,
        tpot_ms=TPOT_MS,
        max_tokens=16_384,
    )
    return Source(entry, trace)


PHASES = (
    ("code", "azure_2023_code.csv.gz", 2.85),
    ("reasoning", "servegen_deepseek_r1_2h_4rps.csv.gz", 1.0),
    ("chat", "azure_2023_conv.csv.gz", 2.9),
)
"""How many times the recording's pace each one has."""
TRACES = tuple(file for _, file, _ in PHASES)


def shifting(data: Path, phase_s: float, seed: int) -> list[Source]:
    """Bursty code, then reasoning, then chat: the best split is another one each time.

    Each seed begins elsewhere in the recordings.
    """
    folder, random = data / "traces", Random(f"{seed}/turned")
    found = []
    for number, (name, file, rate_scale) in enumerate(PHASES):
        rows = read_trace(folder / file).rows
        start_s, turned = number * phase_s, random.random()
        found.append(_phase(name, _stretched(rows, start_s, phase_s, rate_scale, turned)))
    return found


BURST_SHAPE = 0.25
"""Of the gamma law of gaps: their squared variation is 4."""
BURSTS = (("short prompts", 8.0, 400.0, 600.0), ("long prompts", 8.0, 4000.0, 60.0),
          ("both", 8.0, 1024.0, 245.0))  # fmt: skip
"""Requests a second, median prompt, median answer."""


def bursting(data: Path, phase_s: float, seed: int) -> list[Source]:
    """BurstGPT-like arrivals whose lengths shift from phase to phase."""
    found = []
    for number, (name, rate, prompt, answer) in enumerate(BURSTS):
        random, at_s = Random(f"{seed}/{name}"), 0.0
        asks: list[Ask] = []
        while True:
            at_s += random.gammavariate(BURST_SHAPE, 1 / (rate * BURST_SHAPE))
            if at_s >= phase_s:
                break
            tokens = (
                round(middle * random.lognormvariate(0.0, 0.6)) for middle in (prompt, answer)
            )
            lengths = [max(1, min(16_000, count)) for count in tokens]
            asks.append(Ask(number * phase_s + at_s, *lengths))
        found.append(_phase(name, Trace(Path("bursts"), tuple(asks))))
    return found


RIVALS = ("dyn-load", "dyn-sla")
MORE_HEADROOM = {"dyn-load": (2.0, 4.0), "dyn-sla": (1.5, 2.0, 3.0)}
"""How much more than Dynamo's planners want they would have to be given to keep the targets."""


FIXED = ((2, 1), (3, 3), (4, 4))
"""The cheapest that keeps the targets of the one load, and of the other, are among them."""


def fixed_policies() -> list[PolicyEntry]:
    """That do not depend on how long a switch takes."""
    cost = Cost(model=MODEL, device=DEVICE)
    names = [f"{prefills}P{decodes}D" for prefills, decodes in FIXED]
    return [PolicyEntry(name=f"static {name}", fleet=name, cost=cost) for name in names]


def switching(name: str, switch_s: float) -> str:
    return f"{name}, switch {switch_s:g} s"


def acting_policies(switch_s: float) -> list[PolicyEntry]:
    cost, elastically = Cost(model=MODEL, device=DEVICE), elastic_name(switch_s)
    return [
        controlled(switching(name, switch_s), elastically, name, cost) for name in (*RIVALS, OURS)
    ]


def is_ours(policy: PolicyEntry) -> bool:
    return policy.ratio.policy == OURS


def compared_policies() -> list[PolicyEntry]:
    """What makes the difference: the order, and how much is held in hand."""
    cost, order = Cost(model=MODEL, device=DEVICE), "salvage"
    each = [
        ("dopd", "dopd", "fcfs", 1.0),
        (f"{OURS}, fcfs", OURS, "fcfs", 1.0),
        *(
            (f"{name}, {order}, x{times:g}", name, order, times)
            for name, many in MORE_HEADROOM.items()
            for times in many
        ),
    ]
    return [
        controlled(title, elastic_name(SWITCH_S), name, cost, order=order, headroom=headroom)
        for title, name, order, headroom in each
    ]


def dynamic_plan(
    data: Path,
    sources: Sequence[Source],
    duration_s: float,
    seeds: Sequence[int],
    policies: Sequence[PolicyEntry],
) -> Plan:
    fixed = [split(*counts) for counts in FIXED]
    scenario = Scenario(
        name="shifting load",
        seeds=tuple(seeds),
        warm_up_s=0.0,
        duration_s=duration_s,
        drain_s=120.0,
        gateway=GatewayEntry(tick_ms=250.0),
        fleet=(elastic(SWITCH_S), elastic(RELAUNCH_S), *fixed),
        workload=tuple(
            dataclasses.replace(it.entry, arrivals="poisson", trace="") for it in sources
        ),
        policy=tuple(policies),
    )
    base = planned(scenario, data)
    entries = tuple(it.entry for it in sources)
    return dataclasses.replace(
        base,
        scenario=dataclasses.replace(scenario, workload=entries),
        sources=tuple(sources),
    )
