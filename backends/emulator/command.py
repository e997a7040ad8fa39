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
from backends.steptimes import Table, read_table
from backends.words import TYPES, in_words
from policies.clock import Clock
from policies.types import Pool, Role

_BOOTSTRAP_OFFSET = 100
_MOST = 100
"""Servers of one role in one process, which is one core."""

ClockOf = Callable[[asyncio.AbstractEventLoop], Clock]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for role in ("prefill", "decode", "unified"):
        parser.add_argument(f"--{role}", type=int, default=0, metavar="N", help=f"{role} servers")
    parser.add_argument(
        "--port-base", type=int, default=0, help="first port; bootstrap ports follow 100 higher"
    )
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster steps are")
    parser.add_argument(
        "--config", type=Path, help="TOML with [[server]] tables (docs/emulator.md)"
    )


def run_emulator(args: argparse.Namespace, clock_of: ClockOf = lambda loop: loop) -> int:
    """Serve until SIGINT or SIGTERM; answers the exit code."""
    try:
        specs = specs_from(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"slackwater emulate: {in_words(error)}\n")
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
    if not 0 < args.speed < float("inf"):
        raise ValueError("--speed must be positive")
    if not 0 <= args.port_base <= 65_535 - 2 * _BOOTSTRAP_OFFSET:
        raise ValueError(f"--port-base must lie between 1 and {65_535 - 2 * _BOOTSTRAP_OFFSET}")
    if args.config is not None:
        specs = read_specs(args.config)
    else:
        counts = {role: int(getattr(args, role.value)) for role in Role}
        if wrong := [role for role, many in counts.items() if not 0 <= many <= _MOST]:
            raise ValueError(f"--{wrong[0]} must lie between 0 and {_MOST}")
        if not any(counts.values()):
            counts = {Role.PREFILL: 1, Role.DECODE: 1, Role.UNIFIED: 0}
        specs = [
            ServerSpec(engine=EngineConfig(name=f"{role}-{number}", role=role))
            for role, many in counts.items()
            for number in range(1, many + 1)
        ]
    names = [spec.engine.name for spec in specs]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two servers are called {doubled[0]!r}: give each a name")
    if args.port_base and len(specs) > _BOOTSTRAP_OFFSET:
        raise ValueError(f"--port-base has room for {_BOOTSTRAP_OFFSET} servers")
    return [_placed(spec, index, args) for index, spec in enumerate(specs)]


def read_specs(path: Path) -> list[ServerSpec]:
    """Each [[server]] holds EngineConfig's keys, and port, pool, incremental, api_key, table."""
    tables = tomllib.loads(path.read_text())
    if unknown := sorted(set(tables) - {"server"}):
        raise ValueError(f"unknown key {unknown[0]!r}, expected [[server]] tables")
    servers = tables.get("server", [])
    if not servers or not isinstance(servers, list):
        raise ValueError(f"{path} has no [[server]] table")
    return [_spec(dict(table)) for table in servers]


OWN_KEYS: dict[str, type] = {
    "port": int,
    "bootstrap_port": int,
    "incremental": bool,
    "api_key": str,
    "pool": str,
    "table": dict,
}
"""Of a [[server]], beside those of its engine."""
_TYPES: dict[str, type] = {"role": str, "max_queued": int, "extra_slots": int}
"""Where the default does not tell."""


def _spec(table: dict[str, Any]) -> ServerSpec:
    for key, value in table.items():
        _check(key, value)
    outer = {key: table.pop(key) for key in OWN_KEYS if key in table}
    engine = EngineConfig(**{**table, "role": Role(table.get("role", "unified"))})
    if "pool" in outer:
        outer["pool"] = Pool(outer["pool"])
    source = outer.pop("table", None)
    if source is not None:
        outer["times"] = _times(source)
    return ServerSpec(engine=engine, **outer)


def _check(key: str, value: Any) -> None:
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    if key not in defaults and key not in OWN_KEYS:
        known = sorted({*defaults, *OWN_KEYS})
        raise ValueError(f"unknown key {key!r}, expected some of {known}")
    wanted = OWN_KEYS.get(key) or _TYPES.get(key) or type(defaults[key])
    kind = float if wanted is float and type(value) is int else type(value)
    if kind is not wanted:
        raise ValueError(f"{key} must be {TYPES.get(wanted, wanted.__name__)}, got {value!r}")
    if kind in (int, float) and not 0 <= value < 1e18:
        raise ValueError(f"{key} must be at least 0, got {value!r}")


def _times(source: dict[str, Any]) -> Table:
    try:
        path, system, model, tp = (source[key] for key in ("path", "system", "model", "tp"))
    except KeyError as missing:
        raise ValueError(f"table needs a path, a system, a model and a tp: no {missing}") from None
    return read_table(Path(path), system=system, model=model, tp=tp)


def _placed(spec: ServerSpec, index: int, args: argparse.Namespace) -> ServerSpec:
    if not args.port_base:
        return replace(spec, speed=args.speed)
    return replace(
        spec,
        speed=args.speed,
        port=spec.port or args.port_base + index,
        bootstrap_port=spec.bootstrap_port or args.port_base + _BOOTSTRAP_OFFSET + index,
    )
