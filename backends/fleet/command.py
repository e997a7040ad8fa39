"""`slackwater fleet`: what a person sees of a fleet from its start to its end."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from backends.fleet import interpreter
from backends.fleet.control import controlled
from backends.fleet.fleet import Fleet
from backends.fleet.install import install
from backends.fleet.memory import gigabytes
from backends.fleet.spec import Device, FleetError, FleetSpec, Group, read_spec
from policies.types import Pool, Role

DESCRIPTION = """Starts SGLang servers on this machine, keeps them running, and ends them together.
Without FLEET.toml and counts: one prefill, a strict and a relaxed decode, one unified server."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "fleet", nargs="?", type=Path, metavar="FLEET.toml", help="the fleet's table"
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="without a GPU (the default)")
    device.add_argument("--cuda", action="store_true", help="stock servers on GPUs")
    parser.add_argument("--model", help="tiny, smollm2, or a model's directory")
    parser.add_argument("--prefill", type=int, metavar="N", help="how many prefill servers")
    parser.add_argument("--decode", type=int, metavar="N", help="how many; the first one is strict")
    parser.add_argument("--unified", type=int, metavar="N", help="how many unified servers")
    parser.add_argument(
        "--plugin", action="store_true", help="servers load the plug-in (docs/engine-plugin.md)"
    )
    parser.add_argument("--python", help="the interpreter that has SGLang")
    parser.add_argument("--logs", help="the folder for the servers' output")
    parser.add_argument("--output", type=Path, help="write the [[worker]] tables to this file")
    parser.add_argument(
        "--control", type=Path, metavar="SOCKET", help="listen here for changes of role"
    )
    parser.add_argument("--install", action="store_true", help="install SGLang for a CPU, and end")
    parser.add_argument("--index", default="", help="with --install: an index that has torch +cpu")


def run_fleet(args: argparse.Namespace) -> int:
    """Until Ctrl-C; 2 when the fleet cannot be started."""
    console = Console(stderr=True)
    try:
        if args.install:
            return _install(args, console)
        return asyncio.run(serve(spec_of_arguments(args), args.output, console, args.control))
    except FleetError as error:
        return complain(console, str(error))


def spec_of_arguments(args: argparse.Namespace) -> FleetSpec:
    """The file's table with the command line's word over it."""
    spec = read_spec(args.fleet) if args.fleet else FleetSpec()
    for name in ("model", "python", "logs"):
        if (value := getattr(args, name)) is not None:
            spec = replace(spec, **{name: value})
    if args.plugin:
        spec = replace(spec, plugin=True)
    if args.cpu or args.cuda:
        spec = replace(spec, device=Device.CUDA if args.cuda else Device.CPU)
    if any(count is not None for count in (args.prefill, args.decode, args.unified)):
        spec = replace(spec, servers=groups_of(args.prefill, args.decode, args.unified))
    return spec


def groups_of(prefill: int | None, decode: int | None, unified: int | None) -> tuple[Group, ...]:
    """The first of several decode servers is strict, all others are relaxed."""
    counted = (
        Group(role=Role.PREFILL, count=prefill or 0),
        Group(role=Role.DECODE, count=min(decode or 0, 1), pool=Pool.STRICT),
        Group(role=Role.DECODE, count=(decode or 0) - 1),
        Group(role=Role.UNIFIED, count=unified or 0),
    )
    groups = tuple(group for group in counted if group.count > 0)
    if not groups:
        raise FleetError(f"no servers asked for, expected some of {[*map(str, Role)]}")
    return groups


def _install(args: argparse.Namespace, console: Console) -> int:
    problem = install(interpreter.chosen(args.python or ""), args.index)
    return 0 if problem is None else complain(console, problem)


def complain(console: Console, problem: str) -> int:
    """The exit status that goes with it."""
    told = f"slackwater fleet: {problem}"
    console.print(told, style="red", markup=False, highlight=False, soft_wrap=True)
    return 2


async def serve(
    spec: FleetSpec, output: Path | None, console: Console, control: Path | None = None
) -> int:
    """Ready, announced, kept; SIGINT and SIGTERM end it in order."""
    if output is not None and not output.parent.is_dir():
        raise FleetError(f"cannot write {output}: there is no folder {output.parent}")
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        with Board(console) as board:
            async with Fleet(spec, report=board.hear) as fleet:
                board.settle()
                async with controlled(fleet, control) if control is not None else nullcontext():
                    announce(fleet, output, console)
                    await fleet.keep()
    except asyncio.CancelledError:
        console.print("ended; nothing is left running")
    return 0


class Board:
    """A line for each server while they start; one line for each change after that."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._news: dict[str, str] = {}
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._table)
        self._starting = True

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    def settle(self) -> None:
        if self._starting:
            self._starting = False
            self._live.stop()
            if self._news and not self._console.is_terminal:
                self._console.line()  # on a terminal, the end of a live display is one

    def hear(self, name: str, news: str) -> None:
        self._news[name] = news
        if not self._starting:
            self._console.print(f"{name}: {news}", markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, news in self._news.items():
            done = news == "ready" or (name == "fleet" and len(self._news) > 1)
            table.add_row("[green]✓" if done else Spinner("dots"), name, news)
        return table


def announce(fleet: Fleet, output: Path | None, console: Console) -> None:
    """Tables on standard output (or in the file), words on standard error."""
    count = len(fleet.servers)
    memory = gigabytes(fleet.resident_bytes())
    console.print(
        f"{count} servers ready, {memory} resident, logs in {fleet.logs}",
        markup=False,
        soft_wrap=True,
    )
    if output is None:
        sys.stdout.write(fleet.worker_tables())
        sys.stdout.flush()
        console.print("these tables are for a gateway's configuration; Ctrl-C ends the fleet")
        return
    try:
        output.write_text(fleet.worker_tables())
    except OSError as error:
        raise FleetError(f"cannot write {output}: {error.strerror}") from None
    console.print(
        f"[[worker]] tables written to {output}; Ctrl-C ends the fleet",
        markup=False,
        soft_wrap=True,
    )
