"""Says what a measurement ran on, without saying whose machine it was."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("aiohttp", "uvloop", "httptools", "orjson", "numpy", "sglang-router", "smg", "locust")
MODEL = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """No host name, no path, no user: a result can be published as it is."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    packages: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB, "
            f"Linux {self.kernel}, Python {self.python}, {versions}"
        )


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    found = MODEL.search(cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.machine()


def installed(names: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def this_machine(packages: tuple[str, ...] = PACKAGES) -> Machine:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory_bytes / 2**30, 1),
        kernel=re.split(r"[-+]", platform.release())[0],
        python=platform.python_version(),
        packages=installed(packages),
    )
