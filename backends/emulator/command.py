"""`slackwater emulate`: a fleet of emulated servers until interrupted."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import uvloop

from backends.emulator.fleet import EmulatedFleet, ServerSpec, describe
from backends.engine import EngineConfig
from backends.steptimes import read_table
from policies.clock import Clock
from policies.types import Pool, Role

ClockOf = Callable[[asyncio.AbstractEventLoop], Clock]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for role in ("prefill", "decode", "unified"):
        parser.add_argument(f"--{role}", type=int, default=0, metavar="N", help=f"{role} servers")
    parser.add_argument(
        "--port-base", type=int, default=0, help="first port; bootstrap ports follow 100 higher"
    )
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster steps are")
    parser.add_argument("--config", type=Path, help="TOML with [[server]] tables")


def run_emulator(args: argparse.Namespace, clock_of: ClockOf = lambda loop: loop) -> int:
    """Serve until SIGINT or SIGTERM; answers the exit code."""
    try:
        specs = specs_from(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"slackwater emulate: {error}\n")
        return 2
    uvloop.run(serve(specs, clock_of))
    return 0


async def serve(specs: Sequence[ServerSpec], clock_of: ClockOf) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    async with EmulatedFleet(specs, clock_of(loop)) as fleet:
        for server in fleet.servers.values():
            sys.stdout.write(f"# {describe(server)}\n")
        sys.stdout.write(f"\n{fleet.toml()}")
        sys.stdout.flush()
        await stop.wait()


def specs_from(args: argparse.Namespace) -> list[ServerSpec]:
    """Counts by role, or tables; one prefill and one decode server when nothing is said."""
    if args.speed <= 0:
        raise ValueError("--speed must be positive")
    if args.config is not None:
        specs = read_specs(args.config)
    else:
        counts = {role: int(getattr(args, role.value)) for role in Role}
        if not any(counts.values()):
            counts = {Role.PREFILL: 1, Role.DECODE: 1, Role.UNIFIED: 0}
        specs = [
            ServerSpec(engine=EngineConfig(name=f"{role}-{number}", role=role))
            for role, many in counts.items()
            for number in range(1, many + 1)
        ]
    return [_placed(spec, index, args) for index, spec in enumerate(specs)]


def read_specs(path: Path) -> list[ServerSpec]:
    """Each [[server]] holds EngineConfig's keys, and port, pool, incremental, api_key, table."""
    tables = tomllib.loads(path.read_text()).get("server", [])
    if not tables:
        raise ValueError(f"{path} has no [[server]] table")
    return [_spec(dict(table)) for table in tables]


def _spec(table: dict[str, Any]) -> ServerSpec:
    own = ("port", "bootstrap_port", "incremental", "api_key", "pool", "table")
    outer = {key: table.pop(key) for key in own if key in table}
    known = {field.name for field in fields(EngineConfig)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}, expected some of {sorted(known | set(own))}")
    engine = EngineConfig(**{**table, "role": Role(table.get("role", "unified"))})
    if "pool" in outer:
        outer["pool"] = Pool(outer["pool"])
    source = outer.pop("table", None)
    if source is not None:
        outer["times"] = read_table(
            Path(source["path"]), system=source["system"], model=source["model"], tp=source["tp"]
        )
    return ServerSpec(engine=engine, **outer)


def _placed(spec: ServerSpec, index: int, args: argparse.Namespace) -> ServerSpec:
    if not args.port_base:
        return replace(spec, speed=args.speed)
    return replace(
        spec,
        speed=args.speed,
        port=spec.port or args.port_base + index,
        bootstrap_port=spec.bootstrap_port or args.port_base + 100 + index,
    )
