"""What a simulation is told: fleet, workload, targets, policies to compare, seeds and a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from backends.engine import SCHEDULE
from backends.workload import Arrivals, Bursts, Diurnal, Gamma, Poisson
from gateway.config import (
    Admission,
    BreakerSettings,
    Classes,
    Colocation,
    Config,
    Cost,
    Limits,
    Policies,
    RatioSettings,
    Retry,
)
from gateway.settings import bounded, one_of
from gateway.simulation.budget import BudgetEntry
from gateway.simulation.doors import DOORS
from gateway.simulation.oracles import NO_ORACLE, ORACLES
from policies.packing import PACKING
from policies.types import Kind, Pool, Role
from policies.urgency import PREFILL_ORDER

MODES = {
    "stock": "what SGLang 0.5.23 can be made to do from outside",
    "patched": "with a choice of the requests of each decode step and of the order of each chunk",
}
"""How far the engine goes along: each mode is a kind of engine that gateway.simulation builds."""


class BadRows(StrEnum):
    """What happens to a row that cannot be served as it stands."""

    REFUSE = "refuse"
    """The scenario does not run, and the message names the line."""
    SKIP = "skip"
    """It is left out, and counted in the report."""


class Swept(StrEnum):
    """Whose arrivals a sweep multiplies."""

    RATE = "rate"
    """Those of online workloads."""
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEntry:
    """Equal servers; what is 0 or empty here is as the fleet has it, or as the model's card has."""

    name: str = ""
    """A number is added; the role's name when empty."""
    count: int = bounded(1, low=1, high=4096)
    role: Role = Role.UNIFIED
    pool: Pool = Pool.STRICT
    device: str = ""
    model: str = ""
    tp: int = bounded(0, low=0, high=64)
    kv_tokens: int = bounded(0, low=0)
    """KV capacity; 0: what the weights leave on the device."""
    max_running: int = bounded(256, low=1)
    chunk_tokens: int = bounded(8192, low=1)
    page_tokens: int = bounded(1, low=1)
    schedule_policy: str = one_of("fcfs", SCHEDULE)
    """SGLang's own setting: in which order its waiting prompts are taken in."""
    context_tokens: int = bounded(131_072, low=16)
    link_gb_s: float = bounded(25.0, low=0.001)
    """How fast a prompt's KV goes from this prefill server to a decode server."""
    link_latency_ms: float = bounded(2.0, low=0)
    ingest_ms: float = bounded(5.0, low=0)
    """Tokenizing and the way to the scheduler, before any step."""
    speed: float = bounded(1.0, low=0.01)
    """Of its steps, beside the table or the cost model."""
    host: str = ""
    """The first of these servers shares a GPU with the first of all others that say the same, and
    so on. Their KV caches have to be given: `kv_tokens`."""
    joins_s: float = bounded(0.0, low=0)
    """When it is started; 0: it serves from the beginning."""
    start_up_s: float = bounded(60.0, low=0)
    """From its start until it serves, where it joins later; it is paid for meanwhile."""
    role_switch_s: float = bounded(0.4, low=0)
    priority: bool = False
    """Started with priority scheduling: online requests before offline ones in its queues."""
    parked: bool = False
    """It does not run at the beginning: a ratio policy may start it, in either role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitEntry:
    """Constants of step times, where somebody has fitted them."""

    prefill_ms: float = bounded(0.0, low=0)
    """Of each chunk, whatever is in it."""
    prefill_token_us: float = bounded(0.0, low=0)
    """0: there are none; a table or the cost model is used."""
    prefill_pair_ns: float = bounded(0.0, low=0)
    """For each pair of tokens that attention brings together."""
    decode_ms: float = bounded(0.0, low=0)
    """A step of one sequence without context."""
    decode_token_us: float = bounded(0.0, low=0)
    """For each token of context."""
    decode_sequence_us: float = bounded(0.0, low=0)
    decode_experts_ms: float = bounded(0.0, low=0)
    """What a step takes longer once it meets every expert."""
    experts: int = bounded(256, low=1)
    experts_per_token: int = bounded(8, low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEntry:
    name: str = "fleet"
    mode: str = one_of("stock", MODES)
    packing: str = one_of("all", PACKING)
    """patched: which of the running requests take a decode step."""
    prefill_order: str = one_of("fcfs", PREFILL_ORDER)
    """patched: in which order prompts are taken into each chunk."""
    interrupt: bool = False
    """patched: an offline prefill ends with a layer where an online prompt has come."""
    straggler: bool = False
    """A decode step takes as long as if only its longest context were attended to."""
    fit: FitEntry = field(default_factory=FitEntry)
    model: str = "Llama-3.1-8B"
    device: str = "h100"
    tp: int = bounded(1, low=1, high=64)
    table: str = ""
    """Measured steps (CSV), used where the file is there; without it, the cost model's constants,
    moved away from those that predictions use."""
    table_system: str = "h100_sxm"
    table_model: str = "meta-llama/Meta-Llama-3.1-8B"
    noise: float = bounded(0.05, low=0, high=1)
    """Sigma of the log-normal noise on each step."""
    launch_s: float = bounded(45.0, low=0)
    """From the decision to start a parked server until it serves."""
    server: tuple[ServerEntry, ...] = ()


def _poisson(entry: WorkloadEntry, rate: float) -> Arrivals:
    return Poisson(rate=rate)


def _gamma(entry: WorkloadEntry, rate: float) -> Arrivals:
    return Gamma(rate=rate, cv=entry.cv)


def _bursts(entry: WorkloadEntry, rate: float) -> Arrivals:
    factor, burst_s, calm_s = entry.burst_factor, entry.burst_s, entry.calm_s
    return Bursts(rate=rate, factor=factor, burst_s=burst_s, calm_s=calm_s)


def _diurnal(entry: WorkloadEntry, rate: float) -> Arrivals:
    return Diurnal(rate=rate, peak_to_trough=entry.peak_to_trough, day_s=entry.day_s)


OPEN: dict[str, Callable[[WorkloadEntry, float], Arrivals]] = {
    "poisson": _poisson,
    "gamma": _gamma,
    "bursts": _bursts,
    "diurnal": _diurnal,
}
TRACE, CLOSED, BACKLOG = "trace", "closed", "backlog"
ARRIVALS = {**dict.fromkeys(OPEN), TRACE: None, CLOSED: None, BACKLOG: None}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadEntry:
    """One class of requests: who asks, when, how much, and what they expect."""

    name: str
    kind: Kind = Kind.ONLINE
    arrivals: str = one_of("poisson", ARRIVALS)
    """trace: as recorded. closed: so many clients, each with one request at a time. backlog: all
    at the beginning."""
    rate: float = bounded(1.0, low=1e-6)
    """Requests per second, the mean."""
    cv: float = bounded(2.0, low=0.01)
    burst_factor: float = bounded(8.0, low=1)
    burst_s: float = bounded(10.0, low=0.001)
    calm_s: float = bounded(50.0, low=0.001)
    peak_to_trough: float = bounded(4.0, low=1)
    day_s: float = bounded(86_400.0, low=1)
    clients: int = bounded(16, low=1)
    think_s: float = bounded(0.0, low=0)
    """closed: the mean pause of a client between an answer and its next request."""
    count: int = bounded(1000, low=1)
    """backlog: how many there are."""
    trace: str = ""
    """CSV with timestamp, input_tokens, output_tokens and perhaps cached_prefix_tokens."""
    lengths: str = ""
    """CSV whose rows give the lengths of synthetic requests; log-normal ones when empty."""
    from_s: float = bounded(0.0, low=0)
    """Where in the trace to begin."""
    tick_s: float = bounded(0.0, low=0)
    """Times of the trace are told in such ticks: each request is moved within its own."""
    rate_scale: float = bounded(1.0, low=1e-6)
    keep_share: float = bounded(1.0, low=1e-6, high=1.0)
    """Of the rows of a trace, drawn anew for each seed: fewer requests, and bursts as long."""
    bad_rows: BadRows = BadRows.REFUSE
    too_large: BadRows = BadRows.REFUSE
    """The same for requests larger than any server."""
    input_median: float = bounded(1024.0, low=1)
    input_sigma: float = bounded(0.8, low=0)
    input_max: int = bounded(32_768, low=1)
    output_median: float = bounded(128.0, low=1)
    output_sigma: float = bounded(0.8, low=0)
    output_max: int = bounded(4096, low=1)
    max_tokens: int = bounded(4096, low=1)
    """What each request names as its limit: all that policies and servers know of its answer."""
    names_length: bool = False
    """Requests name the true length of their answer instead, as benchmarks with ignore_eos do."""
    prefix_groups: int = bounded(8, low=1)
    """Cached prefixes belong to so many families of prompts."""
    ttft_ms: float = bounded(2000.0, low=1)
    tpot_ms: float = bounded(100.0, low=1)
    patience: float = bounded(5.0, low=1)
    """A prompt that waits for this many TTFT targets is answered 503."""
    window_s: float = bounded(86_400.0, low=1)
    """Offline: how long a request may wait, and take, in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEntry:
    """One column of the comparison: the tables of config.toml that decide."""

    name: str
    fleet: str = ""
    """Which fleet it runs on; empty: the first."""
    policies: Policies = field(default_factory=Policies)
    admission: Admission = field(default_factory=Admission)
    limits: Limits = field(default_factory=Limits)
    retry: Retry = field(default_factory=Retry)
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    cost: Cost = field(default_factory=Cost)
    classes: Classes = field(default_factory=Classes)
    colocation: Colocation = field(default_factory=Colocation)
    door: str = one_of("open", DOORS)
    """What stands before the gateway; all but `open` are other people's rules, to compare with."""
    oracle: str = one_of(NO_ORACLE, ORACLES)
    """An order that knows the true length of answers, in the place of `policies.order`."""
    budget: BudgetEntry = field(default_factory=BudgetEntry)
    """Of the door `latency-budget`."""
    tells_classes: bool = True
    """Whether the gateway is told which requests are offline ones; else all are online to it."""
    ratio: RatioSettings = field(default_factory=RatioSettings)

    def config(self) -> Config:
        return Config(
            policies=self.policies,
            admission=self.admission,
            limits=self.limits,
            retry=self.retry,
            breaker=self.breaker,
            cost=self.cost,
            classes=self.classes,
            colocation=self.colocation,
            ratio=self.ratio,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    of: Swept = Swept.RATE
    values: tuple[float, ...] = (1.0,)
    """Multiples of what the workloads say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayEntry:
    """What the gateway and the way to the servers take."""

    request_ms: float = bounded(0.5, low=0)
    """From a decision until the server has the request."""
    answer_ms: float = bounded(0.5, low=0)
    """From a token at the server until the gateway has it."""
    tick_ms: float = bounded(100.0, low=1)
    """How often progress is told."""
    poll_ms: float = bounded(500.0, low=10)
    """How often each server is asked for its load."""
    report_age_ms: float = bounded(5.0, low=0)
    """How old the load is when it is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    name: str = "scenario"
    about: str = ""
    data: str = ""
    """Where traces and tables lie, as seen from this file; --data goes before it."""
    seeds: tuple[int, ...] = (1, 2, 3)
    warm_up_s: float = bounded(0.0, low=0)
    """Online requests that come earlier are served and not counted."""
    duration_s: float = bounded(0.0, low=0)
    """Arrivals end here; 0: with the last trace."""
    drain_s: float = bounded(600.0, low=0)
    """After the last arrival, what runs may end for this long; what is left counts as missed."""
    gateway: GatewayEntry = field(default_factory=GatewayEntry)
    fleet: tuple[FleetEntry, ...] = ()
    workload: tuple[WorkloadEntry, ...] = ()
    policy: tuple[PolicyEntry, ...] = (PolicyEntry(name="default"),)
    sweep: Sweep = field(default_factory=Sweep)

    def fleet_of(self, policy: PolicyEntry) -> FleetEntry:
        return next(it for it in self.fleet if policy.fleet in ("", it.name))
