"""docs/operations.md has every code and log line with the right numbers; links lead somewhere."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.fleet.install import WITH_DEPENDENCIES
from gateway.errors import STATUS, Code
from gateway.log import LINES_WERE_LOST
from tests.documents import ROOT, rows

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SOURCES = [
    path
    for name in ("gateway", "backends")
    for path in sorted((ROOT / name).rglob("*.py"))
    if "sglang_plugin" not in path.parts  # it speaks in the log of the engine
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEVELS = ("info", "warning", "error", "exception")


def table(title: str) -> list[list[str]]:
    return rows(OPERATIONS.split(f"\n## {title}\n")[1].split("\n## ")[0])


def spoken() -> Iterator[tuple[str, str]]:
    """Every literal that the gateway logs, and how loudly."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                    args=[ast.Constant(value=str(text)), *_],
                ) if level in LEVELS:
                    yield text, "error" if level == "exception" else level
                case _:
                    pass


def test_the_codes_are_those_of_the_gateway_with_their_statuses() -> None:
    told = {row[0].strip("`"): int(row[1]) for row in table("Codes")}
    assert told == {code.value: status for code, status in STATUS.items()}


def test_codes_said_to_be_kept_are_the_ones_that_nothing_answers() -> None:
    text = "".join(path.read_text() for path in SOURCES if path.name != "errors.py")
    unused = {code.value for code in Code if f"Code.{code.name}" not in text}
    assert {row[0].strip("`") for row in table("Codes") if row[2].startswith("kept")} == unused


def test_the_log_lines_are_those_of_the_gateway() -> None:
    told = {row[0].strip("`"): row[1] for row in table("Log lines")}
    written = {"request": "info", LINES_WERE_LOST: "warning"}
    assert told == {**written, **dict(spoken())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_there_are(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_files_that_the_architecture_names_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:gateway|backends|policies|tests)/[\w/]+\.py)`", text))
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_extra_for_sglang_is_what_its_installer_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = WITH_DEPENDENCIES.read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert project["optional-dependencies"]["sglang-cpu"] == wanted
