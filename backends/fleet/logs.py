"""Where the output of a fleet's servers goes, and for how long it is kept."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from backends.fleet import models
from backends.fleet.spec import FleetSpec

KEPT = 5
"""The newest fleets, whose logs stay in the cache; a folder that the user named is the user's."""


class Logs:
    """The folder of one fleet. Held while the fleet runs: nobody else takes it for an old one."""

    def __init__(self, spec: FleetSpec) -> None:
        self.folder = Path(spec.logs) if spec.logs else _another(models.cache_folder() / "logs")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = os.open(self.folder, os.O_RDONLY)
        fcntl.flock(self._held, fcntl.LOCK_SH)

    def close(self) -> None:
        os.close(self._held)


def _another(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    folders = sorted(parent.glob("fleet-*"), key=lambda it: (it.stat().st_mtime_ns, it.name))
    for old in folders[: 1 - KEPT]:
        _remove_unheld(old)
    return Path(tempfile.mkdtemp(prefix="fleet-", dir=parent))


def _remove_unheld(folder: Path) -> None:
    """The system lets go of what a process held that was killed."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)
