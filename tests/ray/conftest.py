"""A real Ray cluster of several nodes in one machine takes half a minute and a gigabyte."""

from __future__ import annotations

import os
from pathlib import Path

REQUIRED = os.environ.get("SLACKWATER_REQUIRE_RAY") == "1"
LEFT_OUT = (
    "left out: tests on a real Ray cluster (SLACKWATER_REQUIRE_RAY=1 has them, docs/ratio.md)"
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.suffix == ".py" and not REQUIRED else None


def pytest_terminal_summary(terminalreporter: object) -> None:
    if not REQUIRED:
        terminalreporter.write_line(LEFT_OUT)  # type: ignore[attr-defined]  # pytest's own
