from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from backends.fleet.stand_ins import HOLLOW, HollowFinder


@pytest.fixture
def hollow() -> Iterator[None]:
    """As in an interpreter without the packages; what was there comes back afterwards."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_hollow(name)}
    finder = HollowFinder()
    sys.meta_path.insert(0, finder)
    yield
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if is_hollow(name)]:
        del sys.modules[name]
    sys.modules |= before


def is_hollow(name: str) -> bool:
    return name.partition(".")[0] in HOLLOW


@pytest.mark.usefixtures("hollow")
def test_any_module_below_a_hollow_package_can_be_imported() -> None:
    deep = importlib.import_module("triton.runtime.autotuner")
    package: Any = importlib.import_module("triton")
    assert package.runtime.autotuner is deep
    assert issubclass(deep.OutOfResources, Exception)


@pytest.mark.usefixtures("hollow")
def test_a_hollow_decorator_returns_the_function_as_it_was() -> None:
    triton: Any = importlib.import_module("triton")
    assert triton.jit(is_hollow) is is_hollow
    assert triton.autotune(configs=[triton.Config({}, num_warps=4)])(is_hollow) is is_hollow


@pytest.mark.usefixtures("hollow")
def test_the_two_helpers_that_run_on_a_cpu_do_compute() -> None:
    triton: Any = importlib.import_module("triton")
    assert [triton.cdiv(n, 4) for n in (1, 4, 5)] == [1, 1, 2]
    assert [triton.next_power_of_2(n) for n in (0, 1, 5, 8)] == [1, 1, 8, 8]


@pytest.mark.usefixtures("hollow")
def test_a_native_kernel_that_is_called_after_all_raises() -> None:
    kernels: Any = importlib.import_module("sgl_kernel")
    with pytest.raises(RuntimeError, match="no native kernel here"):
        kernels.rmsnorm(1, 2)


def test_other_packages_are_left_to_the_other_finders() -> None:
    assert HollowFinder().find_spec("tritonclient") is None
