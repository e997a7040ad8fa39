"""How TOML becomes frozen dataclasses: unknown keys, wrong types and bad values name the key."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from backends.bounds import bounded
from backends.words import TYPES

__all__ = ["ConfigError", "bounded", "decode", "one_of", "read_toml"]

T = TypeVar("T")


class ConfigError(ValueError):
    """Something in the configuration is wrong; the message names the key."""


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def one_of(default: str, choices: Mapping[str, object]) -> Any:
    """A field that names an entry of a registry."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def decode(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is one
    if unknown := table.keys() - fields.keys():
        raise ConfigError(f"unknown key {where}{min(unknown)}, expected one of {sorted(fields)}")
    required = {name for name, f in fields.items() if _is_required(f)}
    if missing := required - table.keys():
        raise ConfigError(f"{where}{min(missing)} is missing")
    values = {
        key: _checked(_value(hints[key], value, where + key), fields[key].metadata, where + key)
        for key, value in table.items()
    }
    return cls(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(wanted: Any, value: Any, key: str) -> Any:
    if get_origin(wanted) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        item = get_args(wanted)[0]
        return tuple(_value(item, entry, f"{key}[{i}]") for i, entry in enumerate(value))
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, dict):
            raise ConfigError(f"{key} must be a table, got {value!r}")
        return decode(wanted, value, f"{key}.")  # type: ignore[arg-type]  # a class, not a value
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return _member(wanted, value, key)
    if isinstance(wanted, types.UnionType):
        wanted = next(arm for arm in get_args(wanted) if arm is not type(None))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{key} must be {TYPES.get(wanted, wanted.__name__)}, got {value!r}")
    if wanted is float and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value!r}")
    return value


def _member(wanted: type[Enum], value: Any, key: str) -> Enum:
    try:
        return wanted(value)
    except ValueError:
        names = [member.value for member in wanted]
        raise ConfigError(f"{key} must be one of {names}, got {value!r}") from None


def _checked(value: Any, limits: Mapping[str, Any], key: str) -> Any:
    choices = limits.get("choices")
    if choices is not None and value not in choices:
        raise ConfigError(f"{key} must be one of {sorted(choices)}, got {value!r}")
    low, high = limits.get("low"), limits.get("high")
    if low is not None and value < low:
        raise ConfigError(f"{key} must be at least {low:g}, got {value!r}")
    if high is not None and value > high:
        raise ConfigError(f"{key} must be at most {high:g}, got {value!r}")
    return value
