"""Logs of the last few fleets stay in the cache; those of one that runs always do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backends.fleet.logs import KEPT, Logs
from backends.fleet.spec import FleetSpec


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "slackwater" / "logs"


def opened(age: int) -> Logs:
    logs = Logs(FleetSpec())
    (logs.folder / "server.log").write_text("hello")
    os.utime(logs.folder, (age, age))
    return logs


def test_the_newest_folders_are_kept(cache: Path) -> None:
    folders = []
    for age in range(KEPT + 3):
        logs = opened(age)
        logs.close()
        folders.append(logs.folder)
    assert set(cache.iterdir()) == set(folders[-KEPT:])
    assert all((folder / "server.log").is_file() for folder in folders[-KEPT:])


def test_the_folder_of_a_fleet_that_runs_is_not_taken_away(cache: Path) -> None:
    running = opened(0)
    for age in range(1, KEPT + 3):
        opened(age).close()
    assert running.folder.is_dir()
    running.close()
    opened(99).close()
    assert not running.folder.exists()
    assert len(list(cache.iterdir())) == KEPT


def test_a_folder_that_was_named_is_made_and_left_alone(cache: Path, tmp_path: Path) -> None:
    logs = Logs(FleetSpec(logs=str(tmp_path / "mine" / "today")))
    logs.close()
    assert logs.folder.is_dir()
    assert not cache.exists()
