"""When there is a Batch API, and what its settings may be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.batch.asked import ENDPOINTS
from gateway.batch.attempts import dialect_of
from gateway.batch.settings import BatchSettings
from gateway.batch.window import seconds_of
from gateway.config import Config, ConfigError, check, load

ROOT = Path(__file__).parents[3]


def test_a_gateway_without_it_loads_no_database() -> None:
    code = "import sys, gateway.__main__; print({'sqlalchemy', 'fsspec'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


def test_it_is_off_until_it_has_a_place_for_files() -> None:
    assert not Config().batch.is_on
    assert BatchSettings(folder="x").is_on


def test_places_lie_beside_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[batch]\nfolder = "batches"\nfiles = "s3://bucket/x"\n')
    batch = load(path).batch
    assert (batch.folder, batch.files) == (str(tmp_path / "batches"), "s3://bucket/x")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (BatchSettings(database="postgresql://x/y"), "batch.files"),
        (BatchSettings(files="s3://x"), "batch.folder"),
        (BatchSettings(folder="x", database="mysql://x/y"), "batch.database"),
    ],
    ids=["no files", "no database", "another database"],
)
def test_what_does_not_go_together_is_refused_by_its_key(settings: BatchSettings, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        check(replace(Config(), batch=settings))


@pytest.mark.parametrize(
    ("window", "seconds"),
    [("24h", 86_400), ("90m", 5_400), ("1h30m", 5_400), ("7d", 604_800), ("45s", 45)],
)
def test_windows_are_durations(window: str, seconds: int) -> None:
    assert seconds_of(window) == seconds


@pytest.mark.parametrize("window", ["", "24", "h", "-1h", "1.5h", "1w", "0s", "24h ", "1h" * 9])
def test_what_is_no_duration_is_none(window: str) -> None:
    assert seconds_of(window) is None


def test_every_endpoint_that_a_batch_may_have_can_be_run() -> None:
    assert [dialect_of(endpoint) is not None for endpoint in ENDPOINTS] == [True] * 4
