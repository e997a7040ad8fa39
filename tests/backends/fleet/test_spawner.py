from __future__ import annotations

import os
from pathlib import Path

from backends.fleet.spawner import SCRATCH, sweep

NOBODY = 2**22 + 1
"""Above every process id."""


def test_only_the_folders_of_the_dead_are_swept(tmp_path: Path) -> None:
    for name in (f"{SCRATCH}{os.getpid()}-a", f"{SCRATCH}{NOBODY}-b", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{SCRATCH}{NOBODY}-b" / "file").write_text("left")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{SCRATCH}{os.getpid()}-a", "other"}
