from __future__ import annotations

from pathlib import Path

from backends.fleet.install import WITH_DEPENDENCIES, WITHOUT_DEPENDENCIES, steps

NEVER = ("nvidia-cu", "cuda", "triton", "flashinfer")


def packages(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def test_torch_is_pinned_to_its_cpu_build_and_no_cuda_package_is_named() -> None:
    pinned = packages(WITH_DEPENDENCIES)
    assert "torch==2.13.0+cpu" in pinned
    assert not [line for line in pinned if line.startswith(NEVER)]


def test_sglang_comes_without_its_dependencies() -> None:
    first, second = steps("python", "")
    assert "sglang==0.5.23" in packages(WITHOUT_DEPENDENCIES)
    assert "--no-deps" not in first
    assert second[-3:] == ["--no-deps", "--requirement", str(WITHOUT_DEPENDENCIES)]


def test_an_index_is_handed_to_the_step_that_needs_it() -> None:
    first, second = steps("python", "https://example.org/cpu")
    assert first[first.index("--extra-index-url") + 1] == "https://example.org/cpu"
    assert "--extra-index-url" not in second
