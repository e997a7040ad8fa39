"""Limits of a setting, written beside its default."""

from __future__ import annotations

import dataclasses
from typing import Any


def bounded(default: Any, *, low: float | None = None, high: float | None = None) -> Any:
    """A field whose value has limits."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})
