"""Which Python has SGLang, how our code runs in it, and what to say when something is missing."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

from backends.fleet.spec import FleetError

ROOT = str(Path(__file__).parents[2])
BOOT = (
    "import sys; sys.path.append(sys.argv[1]); import importlib; "
    "module = importlib.import_module(sys.argv[2]); sys.path.remove(sys.argv[1]); "
    "module.main(sys.argv[3:])"
)
"""Runs a module's `main` without offering the packages that lie beside ours."""
LIBIBVERBS = "libibverbs.so.1"
APT_COMMAND = "apt-get install -y --no-install-recommends libibverbs1"
INSTALL_COMMAND = "slackwater fleet --install"


def chosen(python: str) -> str:
    return python or os.environ.get("SLACKWATER_SGLANG_PYTHON") or sys.executable


def command(python: str, module: str, *arguments: str) -> list[str]:
    return [python, "-c", BOOT, ROOT, module, *arguments]


async def run(python: str, module: str, *arguments: str) -> tuple[int, str]:
    """Its exit status and what it wrote."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command(python, module, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise cannot_run(python, error) from None
    try:
        told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, told.decode(errors="replace")


def cannot_run(python: str, error: OSError) -> FleetError:
    return FleetError(f"cannot run {python}: {error.strerror}")


def missing_package(module: str, python: str) -> str:
    where = "" if python == sys.executable else f" in {python}"
    return f"the package that holds {module} is missing{where}; install it with: {INSTALL_COMMAND}"


def missing_library(load: Callable[[str], object] = ctypes.CDLL) -> str | None:
    """Mooncake's engine links libibverbs even where only TCP is used."""
    try:
        load(LIBIBVERBS)
    except OSError:
        return f"the system library {LIBIBVERBS} is missing; install it with: {APT_COMMAND}"
    return None
