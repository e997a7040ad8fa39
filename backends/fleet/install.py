"""How SGLang comes onto a machine without CUDA: two pip steps, the second without dependencies."""

from __future__ import annotations

import subprocess
from pathlib import Path

from backends.fleet import interpreter

FOLDER = Path(__file__).parent
WITH_DEPENDENCIES = FOLDER / "requirements-cpu.txt"
WITHOUT_DEPENDENCIES = FOLDER / "requirements-cpu-nodeps.txt"
CPU_TORCH_HINT = (
    "torch's CPU build was not found; give pip PyTorch's index of CPU wheels with --index URL "
    "(pytorch.org, Get started: Linux, Pip, CPU)"
)


def steps(python: str, index: str) -> list[list[str]]:
    pip = [python, "-m", "pip", "install"]
    more = ["--extra-index-url", index] if index else []
    return [
        [*pip, *more, "--requirement", str(WITH_DEPENDENCIES)],
        [*pip, "--no-deps", "--requirement", str(WITHOUT_DEPENDENCIES)],
    ]


def install(python: str, index: str) -> str | None:
    """What is wrong, or None."""
    for command in steps(python, index):
        if subprocess.run(command, check=False).returncode != 0:
            return f"pip failed: {' '.join(command)}\n{CPU_TORCH_HINT}"
    return interpreter.missing_library()
