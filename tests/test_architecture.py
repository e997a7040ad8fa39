"""What may import what, and how large and how documented a module is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "policies": {"policies"},
    "backends": {"backends", "policies"},
    "gateway": {"gateway", "backends", "policies"},
}
IMPURE = {"asyncio", "logging", "os", "pathlib", "random", "secrets", "socket", "subprocess"}
IMPURE |= {"threading", "time", "urllib"}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


EVERY_MODULE = [path for package in LAYERS for path in modules(package)]


@dataclass(frozen=True)
class Seen:
    """What the tests ask of a module; it is parsed once."""

    imports: frozenset[str]
    called: frozenset[str]
    awaits: bool
    is_told: bool
    lines: int


@cache
def seen(path: Path) -> Seen:
    text = path.read_text()
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    calls = (node.func for node in nodes if isinstance(node, ast.Call))
    return Seen(
        imports=frozenset(imported(nodes)),
        called=frozenset(func.id for func in calls if isinstance(func, ast.Name)),
        awaits=any(isinstance(node, ast.Await) for node in nodes),
        is_told=bool(ast.get_docstring(tree)),
        lines=len(text.splitlines()),
    )


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        match node:
            case ast.Import(names):
                yield from (alias.name.split(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]
            case ast.ImportFrom(level=level) if level:
                yield "a relative import"


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_inwards(package: str) -> None:
    ours = LAYERS.keys() | {"benchmarks", "tests", "a relative import"}
    for path in modules(package):
        assert seen(path).imports & ours <= LAYERS[package], path


def test_policies_need_the_standard_library_and_nothing_else() -> None:
    for path in modules("policies"):
        foreign = seen(path).imports - sys.stdlib_module_names - {"policies", "numpy"}
        assert not foreign, path


def test_policies_are_pure() -> None:
    for path in modules("policies"):
        assert not seen(path).imports & IMPURE, path
        assert not seen(path).called & IMPURE_CALLS, path


def test_the_core_is_synchronous_and_silent() -> None:
    """The driver is the one interpreter of its decisions."""
    for name in ("core", "books", "choice", "lifecycle"):
        path = ROOT / "gateway" / f"{name}.py"
        assert not seen(path).imports & (IMPURE | {"structlog", "aiohttp"}), path
        assert not seen(path).awaits


def test_every_module_says_what_is_decided_there() -> None:
    silent = [path for path in EVERY_MODULE if not seen(path).is_told]
    assert not silent


def test_files_stay_short() -> None:
    lengths = {path: seen(path).lines for path in EVERY_MODULE}
    assert not {path: length for path, length in lengths.items() if length > 600}


def test_the_checks_see_the_modules_they_are_about() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in EVERY_MODULE}
    assert {"policies/types.py", "backends/base.py", "gateway/core.py"} <= names
