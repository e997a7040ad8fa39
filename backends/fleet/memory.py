"""How much memory a fleet will take, and how much it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from backends.fleet.models import Shape
from backends.fleet.spec import FleetError, FleetSpec

IMPORTS_BYTES = 900 << 20
"""What one import of SGLang takes; every fork shares it."""
SERVER_BYTES = 350 << 20
"""What a server with a model of no size adds."""
KV_COPIES = 1.25


def needed_bytes(spec: FleetSpec, shape: Shape) -> int:
    """An estimate, a little high: the cache counts in full although its pages come with use."""
    servers = sum(group.count for group in spec.servers)
    kv_bytes = int(spec.kv_tokens * shape.kv_bytes_per_token * KV_COPIES)
    return IMPORTS_BYTES + servers * (SERVER_BYTES + 2 * shape.weight_bytes + kv_bytes)


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise FleetError(f"{meminfo} does not say how much memory is available")


def check(spec: FleetSpec, shape: Shape, available: int) -> None:
    if (needed := needed_bytes(spec, shape)) > available:
        raise FleetError(
            f"not enough memory: the fleet needs about {gigabytes(needed)}, "
            f"{gigabytes(available)} are available; use fewer servers or a smaller kv_tokens"
        )


def gigabytes(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = listed.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from family(int(child))


def pss_bytes(pid: int) -> int:
    """Resident memory of a family, each shared page counted once."""
    return sum(_pss_of(member) for member in family(pid))


def _pss_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
