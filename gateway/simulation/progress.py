"""How far a simulation is: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gateway.simulation.world import Tick

LINE_EVERY = 0.1
"""A file or a pipe gets a line for this much more of the whole."""
SHARE = struct.Struct("<d")


class Lines:
    """For standard error that is no terminal."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._told = 0

    def tell(self, share: float) -> None:
        tenths = int(share / LINE_EVERY + 1e-9)
        if tenths > self._told:
            self._told = tenths
            self._out.write(f"simulating: {tenths * LINE_EVERY:.0%}\n")
            self._out.flush()


@contextmanager
def shown(console: Console, *, quiet: bool) -> Generator[Tick, None, None]:
    """Takes the share that is done."""
    if not quiet and not console.is_terminal:
        yield Lines(console.file).tell
        return
    columns = (TextColumn("simulating"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet
    ) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share: progress.update(task, completed=share)


class Shares:
    """What runs in other processes have done: one number for each, in a file between them."""

    def __init__(self, path: Path, runs: int) -> None:
        self._path = path
        path.write_bytes(SHARE.pack(0.0) * runs)

    def of_all(self) -> float:
        shares: list[float] = [share for (share,) in SHARE.iter_unpack(self._path.read_bytes())]
        return sum(shares) / len(shares)


def write_share(path: Path, run: int, share: float) -> None:
    with path.open("r+b") as shares:
        shares.seek(run * SHARE.size)
        shares.write(SHARE.pack(share))
