"""`slackwater check`: asks every server of a configuration whether it fits, before users do."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import uvloop
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from backends.http import Upstream
from backends.sglang import Server
from gateway import serve, terminal
from gateway.actuator_check import actuator_findings, finds_servers
from gateway.clock import LiveClock
from gateway.config import Config, WorkerEntry, worker_of
from gateway.facts import Facts, learn, load_age_s
from gateway.ratio_notes import ratio_notes
from gateway.settings import ConfigError
from gateway.suitability import Finding, Level, findings, levers_of, same_model
from gateway.trial import Route, Trial, try_out
from policies.clock import Clock
from policies.types import Role

_AT_ONCE = 8
"""Trials under way at the same time."""
_STYLES = {Level.BAD: "bold red", Level.WARNING: "yellow", Level.NOTE: "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    servers: tuple[Facts, ...]
    trials: tuple[Trial, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not any(finding.level is Level.BAD for finding in self.findings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    serve.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=10.0,
        metavar="S",
        help="for each page of a server and for each trial (10)",
    )


def run_check(given: argparse.Namespace) -> int:
    """0: all fits; 1: some requests would fail. A wrong configuration is 2, by its own way."""
    if given.fleet is not None:
        raise ConfigError("--fleet starts servers: check looks at those that run already")
    config = serve.configuration(given)
    if not config.worker and not finds_servers(config):
        raise ConfigError(
            "no server to check: give --prefill, --decode or --worker-urls, "
            "or a --config FILE with [[worker]] tables"
        )
    if given.timeout_s <= 0:
        raise ConfigError("--timeout-s must be positive")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        clock = LiveClock(runner.get_loop())
        report = runner.run(inspect(config, clock, random.SystemRandom(), given.timeout_s))
    if given.json:
        sys.stdout.write(orjson.dumps(_as_json(report), option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        show(report, terminal.console())
    return 0 if report.ok else 1


async def inspect(config: Config, clock: Clock, rng: random.Random, timeout_s: float) -> Report:
    servers = [_server(entry, timeout_s) for entry in config.worker]
    try:
        facts = await _learn_all(servers, timeout_s)
        known = [
            Server(one.worker, server.upstream) for one, server in zip(facts, servers, strict=True)
        ]
        trials = await _try_all(list(_routes(facts, known)), clock, rng, timeout_s)
        # A server that has just worked and still tells of an old load is stuck.
        alive = [server for one, server in zip(facts, known, strict=True) if not one.error]
        ages_s = {server.name: await load_age_s(server.upstream, timeout_s) for server in alive}
    finally:
        for server in servers:
            server.upstream.close()
    found = findings(
        facts,
        trials,
        ages_s,
        stale_s=config.telemetry.stale_ms / 1000,
        keeps_pools=config.policies.pools == "latency",
    )
    found += ratio_notes(config.ratio, [one.worker for one in facts])
    found += await actuator_findings(config, clock, rng)
    return Report(servers=tuple(facts), trials=tuple(trials), findings=tuple(found))


def _server(entry: WorkerEntry, timeout_s: float) -> Server:
    worker = worker_of(entry, "worker")
    headers = {"authorization": f"Bearer {entry.api_key}"} if entry.api_key else {}
    return Server(worker, Upstream(worker.url, connect_timeout_s=timeout_s, headers=headers))


async def _learn_all(servers: Sequence[Server], timeout_s: float) -> list[Facts]:
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(learn(server.worker, server.upstream, timeout_s))
            for server in servers
        ]
    return [task.result() for task in asked]


def _routes(facts: Sequence[Facts], servers: Sequence[Server]) -> Iterator[Route]:
    """Every prefill with every decode server of its model, and every unified one."""
    alive = [pair for pair in zip(facts, servers, strict=True) if not pair[0].error]
    by_role = {role: [p for p in alive if p[0].worker.role is role] for role in Role}
    for one, prefill in by_role[Role.PREFILL]:
        for other, decode in by_role[Role.DECODE]:
            if same_model(one, other):
                yield Route(prefill=prefill, decode=decode)
    for _, unified in by_role[Role.UNIFIED]:
        yield Route(prefill=None, decode=unified)


async def _try_all(
    routes: Sequence[Route], clock: Clock, rng: random.Random, timeout_s: float
) -> list[Trial]:
    turnstile = asyncio.Semaphore(_AT_ONCE)

    async def trial(route: Route) -> Trial:
        async with turnstile:
            rid, room = f"check-{rng.getrandbits(64):016x}", rng.getrandbits(62) + 1
            return await try_out(route, rid, room, timeout_s, clock)

    async with asyncio.TaskGroup() as group:
        tried = [group.create_task(trial(route)) for route in routes]
    return [task.result() for task in tried]


# How it is told.


def show(report: Report, console: Console) -> None:
    console.print(terminal.whole(_server_table(report)))
    if report.trials:
        console.print(terminal.whole(_trial_table(report)))
    for (level, text), subjects in _together(report.findings).items():
        words = escape(f"{', '.join(subjects)}: {text}")
        console.print(f"[{_STYLES[level]}]{level}[/] {words}", highlight=False, soft_wrap=True)
    verdict = "all of them can serve" if report.ok else "some requests would fail"
    servers = terminal.counted(len(report.servers), "server")
    routes = terminal.counted(len(report.trials), "route")
    console.print(f"{servers}, {routes}: {verdict}")


def _together(found: Sequence[Finding]) -> dict[tuple[Level, str], list[str]]:
    """What is said of many servers is shown once."""
    subjects: dict[tuple[Level, str], list[str]] = {}
    for finding in found:
        subjects.setdefault((finding.level, finding.text), []).append(finding.subject)
    return subjects


def _server_table(report: Report) -> Table:
    table = Table()
    for title in ("server", "role", "pool", "model", "page", "dp", "KV", "version", "state"):
        table.add_column(title)
    for facts in report.servers:
        worker, told = facts.worker, facts.info
        table.add_row(
            escape(facts.name),
            worker.role.value,
            worker.pool.value,
            escape(worker.model or "?"),
            str(told.get("page_size", "?")),
            str(told.get("dp_size", "?")),
            f"{worker.kv_tokens:,}" if worker.kv_tokens else "?",
            str(told.get("version", "?")),
            "[red]dead[/]" if facts.error else "up",
        )
    return table


def _trial_table(report: Report) -> Table:
    table = Table("prefill", "decode", "one token")
    for trial in report.trials:
        outcome = "[red]none[/]" if trial.error else f"{trial.took_ms:.0f} ms"
        table.add_row(escape(trial.prefill or "-"), escape(trial.decode), outcome)
    return table


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "servers": [_server_json(facts) for facts in report.servers],
        "routes": [
            {
                "prefill": trial.prefill or None,
                "decode": trial.decode,
                "ok": not trial.error,
                "error": trial.error or None,
                "took_ms": round(trial.took_ms, 1),
            }
            for trial in report.trials
        ],
        "findings": [
            {"level": one.level.value, "subject": one.subject, "text": one.text}
            for one in report.findings
        ],
    }


def _server_json(facts: Facts) -> dict[str, Any]:
    worker = facts.worker
    return {
        "name": facts.name,
        "url": worker.url,
        "up": not facts.error,
        "error": facts.error or None,
        "role": worker.role.value,
        "configured_role": facts.configured.role.value,
        "pool": worker.pool.value,
        "models": list(facts.models),
        "page_size": facts.info.get("page_size"),
        "dp_size": facts.info.get("dp_size"),
        "kv_cache_dtype": facts.info.get("kv_cache_dtype"),
        "kv_tokens": worker.kv_tokens or None,
        "version": facts.info.get("version"),
        "levers": levers_of(facts),
    }
