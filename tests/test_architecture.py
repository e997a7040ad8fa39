"""What may import what, and how large and how documented a module is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
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


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names):
                yield from (alias.name.split(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]
            case ast.ImportFrom(level=level) if level:
                yield "a relative import"


def called(path: Path) -> set[str]:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_inwards(package: str) -> None:
    ours = LAYERS.keys() | {"benchmarks", "tests", "a relative import"}
    for path in modules(package):
        assert set(imports(path)) & ours <= LAYERS[package], path


def test_policies_need_the_standard_library_and_nothing_else() -> None:
    for path in modules("policies"):
        foreign = set(imports(path)) - sys.stdlib_module_names - {"policies", "numpy"}
        assert not foreign, path


def test_policies_are_pure() -> None:
    for path in modules("policies"):
        assert not set(imports(path)) & IMPURE, path
        assert not called(path) & IMPURE_CALLS, path


def test_the_core_is_synchronous_and_silent() -> None:
    """The driver is the one interpreter of its decisions."""
    for name in ("core", "books", "choice", "lifecycle"):
        path = ROOT / "gateway" / f"{name}.py"
        assert not set(imports(path)) & (IMPURE | {"structlog", "aiohttp"}), path
        assert not any(isinstance(n, ast.Await) for n in ast.walk(ast.parse(path.read_text())))


def test_every_module_says_what_is_decided_there() -> None:
    silent = [path for path in EVERY_MODULE if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_files_stay_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EVERY_MODULE}
    assert not {name: length for name, length in lengths.items() if length > 600}


def test_the_checks_see_the_modules_they_are_about() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in EVERY_MODULE}
    assert {"policies/types.py", "backends/base.py", "gateway/core.py"} <= names
