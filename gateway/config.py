"""Everything an operator can set, with its default; read once from TOML."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from backends.actuators.settings import Kubernetes, Ray, Relaunch, Webhook
from backends.sglang import Patience
from gateway.actuation import Actuation
from gateway.batch.settings import BatchSettings, batch_beside, check_batch
from gateway.chats import sampling_in
from gateway.costs import Hardware, beside, costs_of
from gateway.planning import Mode
from gateway.plugin_settings import PluginSettings
from gateway.settings import ConfigError, bounded, decode, one_of, read_toml
from policies.pools import WithoutRelaxed
from policies.registry import DISPLACE, GATHER, HOLD, ORDER, PLACE, POOLS, PREEMPT, RATIO
from policies.steps import Costs
from policies.types import Kind, Pool, Role, Worker

__all__ = ["Config", "ConfigError", "load", "workers_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    host: str = "127.0.0.1"
    port: int = bounded(30000, low=0, high=65535)
    max_body_mb: float = bounded(64.0, low=0.001)
    """A larger request is answered 413."""
    header_timeout_s: float = bounded(75.0, low=0.1)
    """A client that opens a connection, or keeps one, sends its next request's headers within this
    time. Clients that keep connections for less (most do for 60 s or less) are never cut off."""
    body_timeout_s: float = bounded(60.0, low=0.1)
    """... and its body within this time after them."""
    drain_s: float = bounded(60.0, low=0)
    """After SIGTERM, running requests may end for this long."""
    admin_key: str = ""
    """Asked for on /workers and /flush_cache.
    Empty: they are open, or closed where there are [[key]]s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEntry:
    url: str
    name: str = ""
    """How logs, metrics and headers call it; its address when empty."""
    role: Role = Role.UNIFIED
    pool: Pool = Pool.STRICT
    bootstrap_port: int = bounded(0, low=0, high=65535)
    """Of a prefill server; 0: the one that it names itself, or 8998."""
    bootstrap_host: str = ""
    """Where decode servers reach its bootstrap server; the host of `url` when empty."""
    model: str = ""
    """The served model; empty: what the server says."""
    host: str = ""
    """Servers with the same host share one GPU."""
    api_key: str = ""
    kv_tokens: int = bounded(0, low=0)
    """KV capacity; 0: what the server says."""
    max_running: int = bounded(0, low=0)
    """Jobs that may decode at once; 0: what the server says."""
    chunk_tokens: int = bounded(0, low=0)
    """Prompt tokens in one prefill step; 0: what the server says."""
    cost_model: str = ""
    """The model's shape, where it is not that of `cost.model`."""
    device: str = ""
    """Its device, where it is not `cost.device`."""
    tp: int = bounded(0, low=0)
    """Its tensor parallelism; 0: `cost.tp`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    order: str = one_of("edf", ORDER)
    """Which queued prompt goes next."""
    displace: str = one_of("none", DISPLACE)
    """How a long prompt is kept from blocking its server: it makes way, or goes out in parts."""
    gather: str = one_of("none", GATHER)
    """Whether short prompts are sent to a prefill server together, and long ones alone."""
    hold: str = one_of("none", HOLD)
    """Whether a prompt waits while those that decode could not bear the steps it would make."""
    place: str = one_of("least-work", PLACE)
    """Which of the servers that may take a job gets it."""
    pools: str = one_of("latency", POOLS)
    """Whether strict servers are kept for online work."""
    preempt: str = one_of("slack", PREEMPT)
    """Whether offline work is taken off its servers for online work. Needs `pools = "latency"`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    ttft_ms: float = bounded(2000.0, low=1)
    """Target for the first token. A caller may ask for less, not for more."""
    tpot_ms: float = bounded(100.0, low=1)
    """Target for each further token."""
    patience: float = bounded(5.0, low=1)
    """A prompt that waits (or would have to) for this many TTFT targets is answered 503."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    window_s: float = bounded(86_400.0, low=1)
    """A held offline request is given up when it has waited this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    default: Kind = Kind.ONLINE
    """The class of a request that names none."""
    online: Online = field(default_factory=Online)
    offline: Offline = field(default_factory=Offline)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_queued: int = bounded(10_000, low=1)
    """Jobs of one class that may wait for one model; more are answered 429."""
    max_tokens: int = bounded(1_048_576, low=1)
    """The largest number of output tokens that a request may ask for."""
    default_max_tokens: int = bounded(1024, low=1)
    """Booked for a request that names no limit on a route where the server has none."""
    max_fan_out: int = bounded(128, low=1)
    """Prompts times samples in one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    prefill_cap_tokens: int = bounded(16_384, low=1)
    """Prompt tokens outstanding at a prefill server that does not tell its chunk size."""
    prefill_chunks: int = bounded(2, low=1)
    """The same in chunks, where the chunk size is known."""
    kv_watermark: float = bounded(0.92, low=0.01, high=1.0)
    """Share of a decode server's KV cache that is booked at most."""
    output_reserve_tokens: int = bounded(512, low=1)
    """KV booked ahead for an answer of unknown length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Colocation:
    gate: bool = True
    """Offline prompts wait where they would delay online ones, and beyond the saturation batch."""
    gate_share: float = bounded(0.25, low=0, high=1)
    """Prompts at a busy prefill server may take this share of `ttft_ms` with an offline one."""
    lend: bool = True
    """Strict decode servers whose hardware is known (`cost`) take offline work in their slack."""
    lend_share: float = bounded(0.9, low=0, high=1)
    """They take more while a step is predicted to stay below this share of the TPOT target."""
    headroom: bool = True
    """They keep room for online work to come: the q90 of its rise in a second."""
    pull: bool = False
    """Relaxed servers hand running work over to strict ones where a job ends sooner for it."""
    shed_share: float = bounded(0.98, low=0, high=2)
    """Offline work is taken off while a step is predicted to take more of the TPOT target."""
    ttft_share: float = bounded(0.5, low=0, high=1)
    """Offline prompts are taken off when an online one would need more of its TTFT target."""
    pause: bool = True
    """Relaxed servers stand still for online work in danger beside them (`worker.host`)."""
    longest_pause_s: float = bounded(5.0, low=0.5, high=60)
    """Then they go on without what they had, and get nothing new until the danger is over."""
    victims: str = one_of("newest", dict.fromkeys(("newest", "bottleneck")))
    """Who goes first: the newest, or the longest where attention bounds the step."""
    protect_after: int = bounded(3, low=1)
    """Preemptions after which a job is left alone while others will do."""
    victims_per_request: int = bounded(8, low=1)
    """Offline jobs that one online request may displace."""
    aborts_per_s: float = bounded(20.0, low=0)
    """Preemptions that are earned each second; abort storms take servers down."""
    abort_burst: int = bounded(40, low=1)
    """The most that can be saved up. Once spent, there are none until half is back."""
    without_relaxed: WithoutRelaxed = WithoutRelaxed.SHARE
    """Offline work where no relaxed server is in rotation: `share` strict ones, wait, or refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    resume: bool = True
    """Offline chats are asked for as token ids, so that they go on after a preemption or a death.
    Those of which that would change the answer stay chats, and are made again."""
    generation_config: str = ""
    """The model's generation_config.json: SGLang fills in what a chat leaves open from it.
    Empty: only chats that leave nothing open go as ids, unless servers fill in OpenAI's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    connect_s: float = bounded(5.0, low=0.01)
    first_token_online_s: float = bounded(60.0, low=0.01)
    """From dispatch to the first byte of a stream."""
    first_token_offline_s: float = bounded(600.0, low=0.01)
    between_tokens_s: float = bounded(60.0, low=0.01)
    per_token_s: float = bounded(0.5, low=0.001)
    """An answer that is not streamed may take this for each token it may have, after the first."""
    total_s: float = bounded(3600.0, low=0.01)
    """One attempt, streamed or not."""
    client_stall_s: float = bounded(60.0, low=0.01)
    """A client that does not read its stream for this long is cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    online_attempts: int = bounded(3, low=1)
    """All tries of one online job, the first included. They follow each other at once."""
    offline_attempts: int = bounded(10, low=1)
    backoff_ms: float = bounded(250.0, low=0)
    """Offline: the pause before the second try; it doubles each time."""
    burst_tokens: int = bounded(262_144, low=0)
    """Prompt tokens that retries may cost before fresh work has earned more."""
    share: float = bounded(0.2, low=0, high=1)
    """What a fresh prompt token adds to that budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSettings:
    failures: int = bounded(3, low=1)
    """Failures in a row that take a server out of rotation. 4xx and own aborts never count."""
    cooldown_ms: float = bounded(2000.0, low=1)
    """Until one request tries it again; one success closes the breaker."""
    cooldown_max_ms: float = bounded(30_000.0, low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    poll_ms: float = bounded(500.0, low=10)
    """How often each server is asked for its load."""
    timeout_ms: float = bounded(2000.0, low=10)
    stale_ms: float = bounded(5000.0, low=10)
    """A report older than this is not believed: the gateway's own books go on alone."""
    failures: int = bounded(3, low=1)
    """Unanswered probes in a row that take a server out of rotation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    key: str
    tenant: str
    kind: Kind = Kind.ONLINE
    """The most urgent class that this key may use, and the one it gets by default."""
    stored_gb: float = bounded(0.0, low=0)
    """What its tenant may have stored for batches; 0: `batch.stored_gb`."""
    open_batches: int = bounded(0, low=0)
    """Batches of its tenant that may be open; 0: `batch.open_batches`."""
    open_rows: int = bounded(0, low=0)
    """Rows in them; 0: `batch.open_rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    constants: str = ""
    """What `slackwater calibrate` wrote; empty: the shipped constants of the device."""
    model: str = ""
    """A known name, a config.json or its folder; empty: step times are not predicted."""
    device: str = ""
    """What all servers run on, such as h100."""
    tp: int = bounded(1, low=1)
    """Devices that one model is spread over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioSettings:
    policy: str = one_of("static", RATIO)
    """How many servers prefill and how many decode; all but `static` need `[cost]`."""
    mode: Mode = Mode.ADVISE
    """advise: what would be done is logged. act: servers are switched."""
    interval_s: float = bounded(15.0, low=1)
    """How often it is looked at, and how far ahead it is planned. Bursts shorter than this are
    the business of queues, not of the ratio."""
    quantile: float = bounded(0.9, low=0.5, high=0.999)
    """The share of intervals whose load the fleet is to be ready for."""
    attained: float = bounded(0.99, low=0.5, high=0.9999)
    """The share of online requests that is to keep each target."""
    band: float = bounded(0.2, low=0, high=2)
    """`dopd+`: what another fleet must be better by."""
    dwell_s: float = bounded(60.0, low=0)
    """`dopd+`: fewer servers must have been enough for so long."""
    headroom: float = bounded(1.0, low=0.1, high=100)
    """`dyn-sla`, `dyn-load`: they plan for so many times the load. 1: as Dynamo does."""
    hand_over_s: float = bounded(5.0, low=0)
    """Online requests that still run then on a server that is to switch go on elsewhere."""
    hand_over_offline_s: float = bounded(0.0, low=0)
    """The same for offline requests."""
    drain_s: float = bounded(120.0, low=1)
    """A server that is not empty by then stays what it is."""
    switch_s: float = bounded(120.0, low=1)
    """A switch that is not over by then is told of; its server stays out of rotation."""
    lease_s: float = bounded(300.0, low=0)
    """A gateway that sees that somebody else has changed a role changes none itself for so long."""
    decode_cuda_graph_memory_gb: float = bounded(0.0, low=0)
    """What a server must have free to become a decode server: its CUDA graphs, as the log of
    another decode server has them. With less it refuses. 0: it does not look, as on CPU."""
    actuator: Actuation = Actuation.SGLANG
    """What changes a server: SGLang's own role switch, or one of the tables below. A change of it,
    or of its table, needs a restart."""
    budget_gpus: int = bounded(0, low=0)
    """GPUs that prefill and decode servers may have together, where the actuator starts and ends
    servers: kubernetes, ray. 0: as many servers as there are."""
    relaunch: Relaunch = field(default_factory=Relaunch)
    webhook: Webhook = field(default_factory=Webhook)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    ray: Ray = field(default_factory=Ray)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    level: str = one_of("info", dict.fromkeys(("debug", "info", "warning", "error")))
    format: str = one_of("auto", dict.fromkeys(("auto", "json", "console")))
    """auto: JSON, and a readable form on a terminal."""
    requests: bool = True
    """One line a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    server: Server = field(default_factory=Server)
    policies: Policies = field(default_factory=Policies)
    classes: Classes = field(default_factory=Classes)
    admission: Admission = field(default_factory=Admission)
    colocation: Colocation = field(default_factory=Colocation)
    plugin: PluginSettings = field(default_factory=PluginSettings)
    limits: Limits = field(default_factory=Limits)
    chat: Chat = field(default_factory=Chat)
    timeouts: Timeouts = field(default_factory=Timeouts)
    retry: Retry = field(default_factory=Retry)
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    telemetry: Telemetry = field(default_factory=Telemetry)
    cost: Cost = field(default_factory=Cost)
    ratio: RatioSettings = field(default_factory=RatioSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    log: Log = field(default_factory=Log)
    worker: tuple[WorkerEntry, ...] = ()
    key: tuple[Key, ...] = ()


def load(path: Path) -> Config:
    return check(_with_paths(decode(Config, read_toml(path)), path.parent))


def _with_paths(config: Config, folder: Path) -> Config:
    """Files that the configuration names lie beside it."""
    entries = tuple(
        replace(entry, cost_model=beside(folder, entry.cost_model)) for entry in config.worker
    )
    cost = replace(
        config.cost,
        constants=str(folder / config.cost.constants) if config.cost.constants else "",
        model=beside(folder, config.cost.model),
    )
    path = config.chat.generation_config
    chat = replace(config.chat, generation_config=str(folder / path) if path else "")
    batch = batch_beside(folder, config.batch)
    return replace(config, worker=entries, cost=cost, chat=chat, batch=batch)


def check(config: Config) -> Config:
    """What no single key can know: names and addresses that clash."""
    names = [worker.name for worker in workers_of(config)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two workers are called {doubled[0]}: give each a worker.name")
    secrets = [key.key for key in config.key]
    if "" in secrets or len(set(secrets)) < len(secrets):
        raise ConfigError("each [[key]] needs a key of its own")
    sampling_in(config.chat.generation_config)
    costs = costs_named(config)
    if config.ratio.policy != "static" and costs.default is None and not costs.by_name:
        raise ConfigError(
            f"ratio.policy {config.ratio.policy!r} reckons with step times: cost.model and "
            "cost.device are missing"
        )
    check_batch(config.batch)
    return config


def costs_named(config: Config) -> Costs:
    own = zip(workers_of(config), config.worker, strict=True)
    cost = config.cost
    return costs_of(
        cost.constants,
        Hardware(model=cost.model, device=cost.device, tp=cost.tp),
        {worker.name: hardware_of(entry) for worker, entry in own},
    )


def hardware_of(entry: WorkerEntry) -> Hardware:
    return Hardware(model=entry.cost_model, device=entry.device, tp=entry.tp)


def workers_of(config: Config) -> list[Worker]:
    return [worker_of(entry, f"worker[{i}]") for i, entry in enumerate(config.worker)]


_IN_HEADERS = frozenset({"name", "api_key"})
_MOST_CHARS = 512
_HERE = frozenset({"127.0.0.1", "localhost", "::1"})
_ANYWHERE = frozenset({"0.0.0.0", "::", ""})


def refuse_itself(worker: Worker, host: str, port: int) -> None:
    """A gateway that listens there would send requests to itself."""
    url = urlsplit(worker.url)
    same = url.hostname == host or (url.hostname in _HERE and host in _HERE | _ANYWHERE)
    if same and url.port == port:
        raise ConfigError(f"worker.url {worker.url} is the gateway's own address")


def worker_of(entry: WorkerEntry, where: str) -> Worker:
    try:
        url = urlsplit(entry.url)
        address = (url.hostname, url.port)
    except ValueError as error:
        raise ConfigError(f"{where}.url: {error}") from None
    plain = entry.url.isascii() and entry.url.isprintable() and not {*" ?#@"} & {*entry.url}
    if url.scheme not in ("http", "https") or not address[0] or not plain:
        raise ConfigError(f"{where}.url must be http://HOST:PORT, got {entry.url!r}")
    for key in ("name", "api_key", "bootstrap_host", "model", "host"):
        value = getattr(entry, key)
        if not value.isprintable() or (key in _IN_HEADERS and not value.isascii()):
            raise ConfigError(f"{where}.{key} stands in headers and logs: printable ASCII only")
        if len(value) > _MOST_CHARS:
            raise ConfigError(f"{where}.{key} must not be longer than {_MOST_CHARS} letters")
    hostname = f"[{address[0]}]" if ":" in address[0] else address[0]
    return Worker(
        name=entry.name or url.netloc,
        url=entry.url.rstrip("/"),
        role=entry.role,
        pool=entry.pool,
        model=entry.model,
        host=entry.host,
        bootstrap_host=entry.bootstrap_host or hostname,
        bootstrap_port=entry.bootstrap_port or None,
        kv_tokens=entry.kv_tokens,
        max_running=entry.max_running,
        chunk_tokens=entry.chunk_tokens,
    )


def tp_of(config: Config) -> dict[str, int]:
    """GPUs of each server, and under no name of those that say nothing of it."""
    own = zip(workers_of(config), config.worker, strict=True)
    return {"": config.cost.tp, **{it.name: entry.tp for it, entry in own if entry.tp}}


def patience_of(timeouts: Timeouts) -> Patience:
    return Patience(
        connect_s=timeouts.connect_s,
        first_token_online_s=timeouts.first_token_online_s,
        first_token_offline_s=timeouts.first_token_offline_s,
        between_tokens_s=timeouts.between_tokens_s,
        total_s=timeouts.total_s,
        client_stall_s=timeouts.client_stall_s,
    )


def with_workers(config: Config, entries: tuple[WorkerEntry, ...]) -> Config:
    return check(replace(config, worker=entries))
