from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest

from backends.emulator import EmulatedFleet, add_arguments, run_emulator
from backends.emulator.command import specs_from
from policies.types import Role


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_counts_become_named_servers() -> None:
    specs = specs_from(parsed("--prefill", "1", "--decode", "2", "--port-base", "31000"))
    assert [spec.engine.name for spec in specs] == ["prefill-1", "decode-1", "decode-2"]
    assert [spec.port for spec in specs] == [31000, 31001, 31002]


def test_without_counts_there_is_one_pair() -> None:
    assert [spec.engine.role for spec in specs_from(parsed())] == [Role.PREFILL, Role.DECODE]


def test_a_file_describes_servers(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[[server]]\nname = "big"\nrole = "unified"\nkv_tokens = 5\nincremental = true')
    spec = specs_from(parsed("--config", str(path)))[0]
    assert (spec.engine.kv_tokens, spec.incremental) == (5, True)


def test_an_unknown_key_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[[server]]\nname = "big"\nkv_token = 5\n')
    assert run_emulator(parsed("--config", str(path))) == 2
    assert "unknown key 'kv_token'" in capsys.readouterr().err


async def test_the_worker_tables_describe_what_runs() -> None:
    async with EmulatedFleet(specs_from(parsed("--prefill", "1", "--unified", "1"))) as fleet:
        workers = tomllib.loads(fleet.toml())["worker"]
        assert [worker["url"] for worker in workers] == list(fleet.urls.values())
        assert workers[0]["bootstrap_port"] == fleet["prefill-1"].bootstrap_port
