from __future__ import annotations

import argparse
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from backends.emulator import EmulatedFleet, add_arguments, run_emulator
from backends.emulator.command import OWN_KEYS, specs_from
from backends.engine import EngineConfig
from policies.types import Role
from tests.documents import rows


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


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--prefill", "-1"), "--prefill must lie between 0 and 100"),
        (("--decode", "101"), "--decode must lie between 0 and 100"),
        (("--speed", "0"), "--speed must be positive"),
        (("--speed", "nan"), "--speed must be positive"),
        (("--port-base", "-5"), "--port-base must lie between"),
        (("--port-base", "65500"), "--port-base must lie between"),
        (("--unified", "60", "--decode", "60", "--port-base", "31000"), "room for 100 servers"),
        (("--config", "/nowhere.toml"), "No such file"),
    ],
)
def test_flags_that_make_no_sense_are_refused(words: tuple[str, ...], problem: str) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(problem)):
        specs_from(parsed(*words))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no [[server]] table"),
        ("server = 3", "has no [[server]] table"),
        ("[[servers]]", "unknown key 'servers', expected [[server]] tables"),
        ("[[server]]\n[[server]]", "two servers are called 'server'"),
        ('[[server]]\nkv_tokens = "many"', "kv_tokens must be a whole number, got 'many'"),
        ("[[server]]\nkv_tokens = -1", "kv_tokens must be at least 0"),
        ("[[server]]\nmax_queued = true", "max_queued must be a whole number"),
        ("[[server]]\nincremental = 1", "incremental must be true or false"),
        ('[[server]]\nrole = "best"', "'best' is not a valid Role"),
        ('[[server]]\ntable = {path = "x"}', "table needs a path, a system, a model and a tp"),
        ("[[server]", "Expected"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(problem)):
        specs_from(parsed("--config", str(path)))


def test_every_key_of_the_file_is_in_its_page_with_its_default() -> None:
    page = (Path(__file__).parents[3] / "docs" / "emulator.md").read_text()
    told = {
        key: row[1].strip("`")
        for row in rows(page.split("\n## A file of servers\n")[1])
        for key in re.findall(r"`(\w+)`", row[0])
    }
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    assert set(told) == {*defaults, *OWN_KEYS}
    written = {
        name: "-" if value is None else str(value).lower() for name, value in defaults.items()
    }
    for name in ("port", "bootstrap_port", "pool", "incremental", "api_key", "table"):
        written.pop(name, None)
    assert {name: told[name].strip('"') for name in written} == written
