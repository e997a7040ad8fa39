"""How calibrated constants are kept in a TOML file, and what such a file may say."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.constants import NUMBERS, Constants, ConstantsError, Key, check

KEYS = ("device", "family", "tp")


def dump_constants(table: Mapping[Key, Constants]) -> str:
    lines = ["# How far this hardware stays behind its peaks; written by slackwater calibrate."]
    for (device, family, tp), constants in table.items():
        lines += ["", "[[constants]]", f"device = {_text(device)}", f"family = {_text(family)}"]
        lines.append(f"tp = {tp}")
        lines += [f"{name} = {getattr(constants, name):.6g}" for name in NUMBERS]
        lines.append(f"source = {_text(constants.source)}")
    return "\n".join([*lines, ""])


def _text(value: str) -> str:
    """JSON strings are TOML strings as long as nothing beyond the basic plane is escaped."""
    return json.dumps(value, ensure_ascii=False)


def parse_constants(text: str) -> dict[Key, Constants]:
    """Refuses unknown keys, missing numbers, and numbers that no machine has."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConstantsError(f"not a TOML file: {error}") from error
    entries = document.pop("constants", None)
    if document or not isinstance(entries, list) or not entries:
        raise ConstantsError("expected [[constants]] tables and nothing else")
    return dict(map(_entry, entries))


def load_constants(path: Path) -> dict[Key, Constants]:
    try:
        return parse_constants(path.read_text())
    except ConstantsError as error:
        raise ConstantsError(f"{path}: {error}") from error


def _entry(entry: Mapping[str, Any]) -> tuple[Key, Constants]:
    known = {*KEYS, *NUMBERS, "source"}
    unknown, missing = sorted(set(entry) - known), sorted(known - set(entry))
    if unknown or missing:
        raise ConstantsError(f"unknown keys {unknown}, missing keys {missing}")
    device, family, tp = entry["device"], entry["family"], entry["tp"]
    if not isinstance(device, str) or not isinstance(family, str) or type(tp) is not int:
        raise ConstantsError(f"device {device!r}, family {family!r}, tp {tp!r}: text, text, number")
    numbers = {name: _number(name, entry[name]) for name in NUMBERS}
    return (device, family, tp), check(Constants(source=str(entry["source"]), **numbers))


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConstantsError(f"{name} = {value!r} is not a number")
    return float(value)
