"""Whether servers fit the gateway and each other: rules over what they said and what was tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from backends.engine_words import NO_FEATURE, Feature, states_of
from gateway.facts import Facts
from gateway.trial import Trial
from policies.types import Kind, Pool, Role


class Level(StrEnum):
    BAD = "bad"
    """Requests will fail."""
    WARNING = "warning"
    """Requests are served, not as the configuration says or knows."""
    NOTE = "note"
    """Something that the server could do is switched off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    level: Level
    subject: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """Something that stock SGLang offers under a flag, and what the gateway does with it."""

    name: str
    key: str
    """Where /server_info tells of it."""
    without: str
    roles: frozenset[Role] = frozenset(Role)


SEES_NONE = (
    "without the plug-in's reports it sees no steps: with no [cost] everybody steps, and offline "
    "work is kept off from outside as on a stock server"
)
_FLAGS = {Role.PREFILL: "--prefill", Role.DECODE: "--decode", Role.UNIFIED: "--worker-urls"}
LEVERS = (
    Lever(
        name="incremental streaming",
        key="incremental_streaming_output",
        without="each event of a /generate stream repeats the text so far; "
        "--incremental-streaming-output saves those bytes",
    ),
    Lever(
        name="priority scheduling",
        key="enable_priority_scheduling",
        without="what already waits inside the server is served in order of arrival, online or "
        "not (the gateway's own queue, policies.order, is not concerned); "
        "--enable-priority-scheduling",
    ),
    Lever(
        name="metrics",
        key="enable_metrics",
        without="the server's own /metrics is empty (the gateway does not read it); "
        "--enable-metrics",
    ),
    Lever(
        name="role switch",
        key="enable_pd_role_switch",
        without="its role can only be changed by a restart (ratio.actuator has ways for that); "
        "--enable-pd-role-switch",
        roles=frozenset((Role.PREFILL, Role.DECODE)),
    ),
)


def findings(
    servers: Sequence[Facts],
    trials: Sequence[Trial],
    load_ages_s: dict[str, float | None],
    *,
    stale_s: float,
    keeps_pools: bool,
) -> list[Finding]:
    """The worst first; among equals, in the order of the configuration."""
    found: list[Finding] = []
    for facts in servers:
        found += of_server(facts)
        if not facts.error:
            found += _of_load(facts.name, load_ages_s.get(facts.name), stale_s)
    found += of_fleet(servers, keeps_pools=keeps_pools)
    by_name = {facts.name: facts for facts in servers}
    for trial in trials:
        found += of_pair(trial, by_name)
    order = list(Level)
    return sorted(found, key=lambda one: order.index(one.level))


def of_server(facts: Facts) -> Iterator[Finding]:
    name, worker, configured = facts.name, facts.worker, facts.configured
    if facts.error:
        yield Finding(level=Level.BAD, subject=name, text=facts.error)
        return
    if not facts.info:
        text = "it has no /server_info: it is taken as configured"
        yield Finding(level=Level.WARNING, subject=name, text=text)
    if worker.role is not configured.role:
        text = (
            f"configured as {configured.role}, is {worker.role}: the gateway goes by what it is; "
            f'say {_FLAGS[worker.role]}, or role = "{worker.role}" in its [[worker]]'
        )
        yield Finding(level=Level.WARNING, subject=name, text=text)
    if not facts.models:
        text = "it names no model at /v1/models: requests for any model may go there"
        yield Finding(level=Level.WARNING, subject=name, text=text)
    elif configured.model and configured.model not in facts.models:
        text = f"configured for {configured.model}, it serves {', '.join(facts.models)}"
        yield Finding(level=Level.WARNING, subject=name, text=text)
    if facts.bootstrap_error:
        text = f"its bootstrap server does not answer from here: {facts.bootstrap_error}"
        yield Finding(level=Level.WARNING, subject=name, text=text)
    yield from _of_levers(facts)
    yield from _of_plugin(facts)


def _of_plugin(facts: Facts) -> Iterator[Finding]:
    """Where there is none, nothing is missing: stock levers do."""
    if (heard := states_of(facts.info)) is None:
        return
    on = ", ".join(sorted(heard.features)) or "nothing"
    text = f"it has the plug-in: {on}; mode {heard.mode}"
    yield Finding(level=Level.NOTE, subject=facts.name, text=text)
    if Feature.DECODE in heard.features and Feature.REPORTS not in heard.features:
        yield Finding(level=Level.WARNING, subject=facts.name, text=SEES_NONE)
    for feature, why in heard.why_off.items():
        text = f"the plug-in's {feature} is off: {why}"
        level = Level.WARNING if heard.faults or why == NO_FEATURE else Level.NOTE
        yield Finding(level=level, subject=facts.name, text=text)


def levers_of(facts: Facts) -> dict[str, bool | None]:
    """What the server has switched on; None where it does not tell."""
    return {
        lever.name: told if isinstance(told := facts.info.get(lever.key), bool) else None
        for lever in LEVERS
        if facts.worker.role in lever.roles
    }


def _of_levers(facts: Facts) -> Iterator[Finding]:
    has = levers_of(facts)
    for lever in LEVERS:
        if has.get(lever.name) is False:
            text = f"no {lever.name}: {lever.without}"
            yield Finding(level=Level.NOTE, subject=facts.name, text=text)


def _of_load(name: str, age_s: float | None, stale_s: float) -> Iterator[Finding]:
    if age_s is None:
        text = "no /v1/loads: admission counts only what this gateway has sent there"
        yield Finding(level=Level.WARNING, subject=name, text=text)
    elif age_s > stale_s:
        text = f"its load report is {age_s:.0f} s old although it has just been used"
        yield Finding(level=Level.WARNING, subject=name, text=text)


def of_pair(trial: Trial, servers: dict[str, Facts]) -> Iterator[Finding]:
    subject = f"{trial.prefill} -> {trial.decode}" if trial.prefill else trial.decode
    if trial.error:
        yield Finding(level=Level.BAD, subject=subject, text=f"no token: {trial.error}")
    if not trial.prefill:
        return
    prefill, decode = servers[trial.prefill], servers[trial.decode]
    pages = (prefill.info.get("page_size"), decode.info.get("page_size"))
    if None not in pages and pages[0] != pages[1]:
        text = f"page sizes differ: {pages[0]} and {pages[1]}; SGLang refuses such a pair"
        yield Finding(level=Level.BAD, subject=subject, text=text)
    dtypes = (prefill.info.get("kv_cache_dtype"), decode.info.get("kv_cache_dtype"))
    if not {None, "auto"} & set(dtypes) and dtypes[0] != dtypes[1]:
        text = f"KV cache types differ: {dtypes[0]} and {dtypes[1]}; SGLang refuses such a pair"
        yield Finding(level=Level.BAD, subject=subject, text=text)
    if prefill.worker.dp_size != decode.worker.dp_size:
        sizes = f"{prefill.worker.dp_size} and {decode.worker.dp_size}"
        text = f"data-parallel sizes differ: {sizes}"
        yield Finding(level=Level.WARNING, subject=subject, text=text)


def of_fleet(servers: Sequence[Facts], *, keeps_pools: bool) -> Iterator[Finding]:
    alive = [facts for facts in servers if not facts.error]
    prefills = [facts for facts in alive if facts.worker.role is Role.PREFILL]
    decodes = [facts for facts in alive if facts.worker.role is Role.DECODE]
    for one, others, missing in ((prefills, decodes, "decode"), (decodes, prefills, "prefill")):
        for facts in one:
            if not any(same_model(facts, other) for other in others):
                text = f"there is no {missing} server that it could work with"
                yield Finding(level=Level.BAD, subject=facts.name, text=text)
    unified = [facts for facts in alive if facts.worker.role is Role.UNIFIED]
    if keeps_pools and decodes and len({facts.worker.pool for facts in decodes + unified}) == 1:
        kept = Kind.OFFLINE if decodes[0].worker.pool is Pool.STRICT else Kind.ONLINE
        text = (
            f'policies.pools = "latency", and all decode servers are {decodes[0].worker.pool}: '
            f"{kept} work shares them"
        )
        yield Finding(level=Level.NOTE, subject="fleet", text=text)


def same_model(one: Facts, other: Facts) -> bool:
    """As the gateway pairs them: a server that names no model takes any."""
    models = (one.worker.model, other.worker.model)
    return "" in models or models[0] == models[1]
