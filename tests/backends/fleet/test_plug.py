"""A server finds the plug-in in an interpreter that has SGLang and nothing of ours."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from backends.fleet import plug
from backends.fleet.command import add_arguments, spec_of_arguments
from backends.fleet.spec import spec_of

FIND = """
from importlib.metadata import entry_points
found = entry_points(group="sglang.srt.plugins")
print([(one.name, one.dist.name, one.load().__module__) for one in found])
"""


def test_it_is_found_by_the_door_that_sglang_opens(tmp_path: Path) -> None:
    env = plug.offered(tmp_path)
    told = subprocess.run(
        [sys.executable, "-S", "-c", FIND], env=env, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "[('slackwater', 'slackwater', 'backends.sglang_plugin.door')]"
    assert env["SGLANG_PLUGINS"] == "slackwater"


def test_what_was_left_by_an_earlier_fleet_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "policies").symlink_to(tmp_path / "gone")
    assert plug.offered(tmp_path) == plug.offered(tmp_path)
    assert (tmp_path / "policies" / "stepping.py").is_file()


def test_nothing_else_that_lies_beside_us_is_offered(tmp_path: Path) -> None:
    plug.offered(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["backends", "policies", "slackwater-0.dist-info"]


def test_a_fleet_has_it_by_its_file_or_by_a_flag() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert spec_of_arguments(parser.parse_args(["--plugin"])).plugin
    assert not spec_of_arguments(parser.parse_args([])).plugin
    assert spec_of({"plugin": True}).plugin
