from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends.fleet.spawner import SCRATCH, exit_status, sweep

NOBODY = 2**22 + 1
"""Above every process id."""


def test_only_the_folders_of_the_dead_are_swept(tmp_path: Path) -> None:
    for name in (f"{SCRATCH}{os.getpid()}-a", f"{SCRATCH}{NOBODY}-b", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / f"{SCRATCH}{NOBODY}-b" / "file").write_text("left")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{SCRATCH}{os.getpid()}-a", "other"}


def test_an_exit_means_what_it_means_to_the_interpreter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [exit_status(SystemExit(code)) for code in (None, 0, 2)] == [0, 0, 2]
    assert exit_status(SystemExit("no such model")) == 1
    assert capsys.readouterr().err == "no such model\n"
