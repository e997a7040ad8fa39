"""Which keys of a configuration are not what they were: only their names, for values are secret."""

from __future__ import annotations

import dataclasses
from typing import Any

from gateway.config import Config, RatioSettings, Server

Section = Config | Server | RatioSettings


def changed_keys(old: Section, new: Section, where: str = "") -> list[str]:
    """As the file has them; of tables that are a list, such as [[worker]], the list's name."""
    found: list[str] = []
    for field in dataclasses.fields(new):
        before, after = getattr(old, field.name, None), getattr(new, field.name)
        found += _changed(before, after, where + field.name)
    return found


def _changed(before: Any, after: Any, key: str) -> list[str]:
    if before == after:
        return []
    if dataclasses.is_dataclass(after):
        return changed_keys(before, after, f"{key}.")  # type: ignore[arg-type]  # any section
    return [key]
