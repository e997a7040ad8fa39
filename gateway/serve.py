"""`slackwater serve`: a configuration file, the flags that SGLang's router knows, or neither."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from dataclasses import replace
from pathlib import Path

import structlog
import uvloop
from rich.console import Console

from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from backends.fleet.command import Board
from backends.fleet.fleet import Fleet
from backends.fleet.spec import FleetSpec, read_spec
from gateway import collector
from gateway.actuator_demands import demand
from gateway.app import Reading, run
from gateway.clock import LiveClock
from gateway.config import (
    Config,
    Server,
    Timeouts,
    WorkerEntry,
    check,
    load,
    with_workers,
    worker_of,
)
from gateway.listening import try_to_listen
from gateway.router_flags import LEVELS, add_idle, idle_flags, is_stand_in, place_named
from gateway.settings import ConfigError, decode
from policies.clock import Clock
from policies.types import Pool, Role

_EMBEDDED = (
    ServerSpec(engine=EngineConfig(name="prefill-1", role=Role.PREFILL), pool=Pool.RELAXED),
    ServerSpec(engine=EngineConfig(name="decode-strict", role=Role.DECODE), pool=Pool.STRICT),
    ServerSpec(engine=EngineConfig(name="decode-relaxed", role=Role.DECODE), pool=Pool.RELAXED),
)
_WELCOME = """
slackwater has started three EMULATED servers: a relaxed prefill server, a strict and a relaxed
decode server. They keep the times of an 8B model on one H100 each and answer made-up words. Try:

  curl -N http://{host}:{port}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'

"""

log = structlog.get_logger("slackwater")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="config.toml; the flags below go before it")
    add("--host", help="address to listen on (127.0.0.1)")
    add("--port", type=int, help="port to listen on (30000)")
    add(
        "--prefill",
        nargs="+",
        action="append",
        default=[],
        metavar="URL [PORT]",
        help="a prefill server and its bootstrap port; may be repeated",
    )
    add("--decode", action="append", default=[], metavar="URL", help="a decode server")
    add("--worker-urls", nargs="+", default=[], metavar="URL", help="unified servers")
    add("--fleet", type=Path, metavar="FILE", help="start this fleet of real servers, too")
    add("--api-key", default="", help="sent to the servers that the flags name")
    add("--policy", metavar="NAME", help="placement: least-work, round_robin, cache_aware, ...")
    add("--request-timeout-secs", type=float, metavar="S", help="the longest a request may take")
    add("--log-level", choices=("debug", "info", "warning", "error", "warn"))
    add("--pd-disaggregation", action="store_true", help="accepted; it follows from --prefill")
    add_idle(parser)


def run_serve(given: argparse.Namespace) -> int:
    config = configuration(given)
    collector.run_rarely()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        clock = LiveClock(runner.get_loop())
        rng = random.Random(random.SystemRandom().getrandbits(128))
        if given.fleet is not None:
            runner.run(_run_over_fleet(given, read_spec(given.fleet), clock, rng))
        elif config.worker:
            runner.run(
                run(lambda: _read(given), given.config, clock, rng, lambda _: _say_flags(given))
            )
        else:
            runner.run(_run_embedded(given, clock, rng))
    return 0


async def _run_embedded(given: argparse.Namespace, clock: Clock, rng: random.Random) -> None:
    """Without a server to stand in front of, the gateway brings its own, made up but alive."""
    async with EmulatedFleet(_EMBEDDED, clock) as fleet:
        entries = tuple(
            WorkerEntry(
                url=server.url,
                name=name,
                role=server.spec.engine.role,
                pool=server.spec.pool,
                bootstrap_port=server.bootstrap_port,
            )
            for name, server in fleet.servers.items()
        )
        host = configuration(given).server.host
        await run(
            lambda: _read_or_emulate(given, entries),
            given.config,
            clock,
            rng,
            greet=lambda port: _welcome(given, host, port),
        )


def _welcome(given: argparse.Namespace, host: str, port: int) -> None:
    sys.stderr.write(_WELCOME.format(host=host, port=port))
    _say_flags(given)


def _say_flags(given: argparse.Namespace) -> None:
    """What a router's command line asks for and does not get."""
    if idle := idle_flags(given):
        log.warning("flags of SGLang's router that do nothing here", flags=idle)
    if given.policy is not None and is_stand_in(given.policy):
        policy = place_named(given.policy)
        log.warning("there is no such policy here: another takes its place",
                    asked=given.policy, policy=policy)  # fmt: skip


def _read(given: argparse.Namespace) -> Reading:
    config = configuration(given)
    hidden = bool(_entries(given)) and given.config is not None and bool(load(given.config).worker)
    return Reading(config=config, flags_hide_workers=hidden)


def _read_or_emulate(given: argparse.Namespace, emulated: tuple[WorkerEntry, ...]) -> Reading:
    """Servers that a reload brings take the place of the emulated ones, and give it back."""
    config = configuration(given)
    if config.worker:
        return Reading(config=config)
    return Reading(config=with_workers(config, emulated), is_emulated=True)


def _read_beside(given: argparse.Namespace, started: tuple[WorkerEntry, ...]) -> Reading:
    reading = _read(given)
    config = with_workers(reading.config, (*started, *reading.config.worker))
    return replace(reading, config=config)


async def _run_over_fleet(
    given: argparse.Namespace, spec: FleetSpec, clock: Clock, rng: random.Random
) -> None:
    """Real servers of our own, started before the gateway and ended after it."""
    await try_to_listen(configuration(given).server)
    with Board(Console(stderr=True)) as board:
        async with Fleet(spec, report=board.hear) as fleet:
            board.settle()
            entries = tuple(
                WorkerEntry(
                    url=server.url,
                    name=server.name,
                    role=server.role,
                    pool=server.pool,
                    bootstrap_port=server.bootstrap_port or 0,
                )
                for server in fleet.servers
            )
            async with asyncio.TaskGroup() as tasks:
                keeper = tasks.create_task(fleet.keep())
                await run(
                    lambda: _read_beside(given, entries),
                    given.config,
                    clock,
                    rng,
                    lambda _: _say_flags(given),
                    fleet=fleet,
                )
                keeper.cancel()


def configuration(given: argparse.Namespace) -> Config:
    config = load(given.config) if given.config is not None else Config()
    server = config.server
    if given.host is not None:
        server = replace(server, host=given.host)
    if given.port is not None:
        server = replace(server, port=decode(Server, {"port": given.port}, "server.").port)
    config = replace(config, server=server)
    if given.request_timeout_secs is not None:
        asked = decode(Timeouts, {"total_s": given.request_timeout_secs}, "timeouts.")
        timeouts = replace(config.timeouts, total_s=asked.total_s)
        config = replace(config, timeouts=timeouts)
    if given.log_level is not None:
        level = LEVELS.get(given.log_level, given.log_level)
        config = replace(config, log=replace(config.log, level=level))
    if given.policy is not None:
        place = place_named(given.policy)
        config = replace(config, policies=replace(config.policies, place=place))
    demand(config.ratio, has_fleet=given.fleet is not None)
    entries = _entries(given)
    return check(replace(config, worker=entries) if entries else config)


def _entries(given: argparse.Namespace) -> tuple[WorkerEntry, ...]:
    key = given.api_key
    prefills = [_prefill(values, key) for values in given.prefill]
    decodes = [WorkerEntry(url=url, role=Role.DECODE, api_key=key) for url in given.decode]
    unified = [WorkerEntry(url=url, api_key=key) for url in given.worker_urls]
    by_flag = {"--prefill": prefills, "--decode": decodes, "--worker-urls": unified}
    for flag, entries in by_flag.items():
        for entry in entries:
            _refuse_odd(flag, entry)
    return (*prefills, *decodes, *unified)


def _refuse_odd(flag: str, entry: WorkerEntry) -> None:
    """An address that is none is told of by the flag that it was given with."""
    try:
        worker_of(entry, flag)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{flag}.url", flag)) from None


def _prefill(values: list[str], key: str) -> WorkerEntry:
    url, *port = values
    if port in ([], ["none"]):
        return WorkerEntry(url=url, role=Role.PREFILL, api_key=key)
    if len(port) > 1 or not port[0].isdigit():
        raise ConfigError(f"--prefill takes a URL and at most one port, got {' '.join(values)}")
    return WorkerEntry(url=url, role=Role.PREFILL, bootstrap_port=int(port[0]), api_key=key)
