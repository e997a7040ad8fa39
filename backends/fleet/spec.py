"""What a fleet is asked to be: a short table, read strictly."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from backends.words import TYPES
from policies.types import Pool, Role


class FleetError(Exception):
    """The fleet cannot be what it was asked to be; the text says why and what to do."""


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Servers that are alike."""

    role: Role
    count: int = 1
    pool: Pool = Pool.RELAXED
    port: int = 0
    """The first server's; the others follow. 0 takes free ones."""
    flags: tuple[str, ...] = ()
    """Added to the command line of each."""
    gpus: tuple[str, ...] = ()
    """What each server sees as CUDA_VISIBLE_DEVICES, in turn."""


DEFAULT_GROUPS = (
    Group(role=Role.PREFILL),
    Group(role=Role.DECODE, pool=Pool.STRICT),
    Group(role=Role.DECODE),
    Group(role=Role.UNIFIED),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    model: str = "tiny"
    """`tiny`, `smollm2`, or a directory; on a GPU also a name that SGLang can download."""
    device: Device = Device.CPU
    python: str = ""
    """The interpreter that has SGLang; empty means $SLACKWATER_SGLANG_PYTHON, then this one."""
    logs: str = ""
    """Where each server's output goes; empty means a folder in the user's cache."""
    kv_tokens: int = 16_384
    """Tokens that each server keeps, on a CPU."""
    flags: tuple[str, ...] = ()
    """Added to every command line."""
    env: dict[str, str] = field(default_factory=dict)
    overlap: bool = False
    """Decode servers on a CPU keep SGLang's overlap scheduling, which is otherwise off there."""
    plugin: bool = False
    """Whether the servers load our plug-in for SGLang."""
    start_timeout_s: float = 300.0
    servers: tuple[Group, ...] = DEFAULT_GROUPS


def read_spec(path: Path) -> FleetSpec:
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise FleetError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise FleetError(f"{path}: {error}") from None
    try:
        return spec_of(table)
    except FleetError as error:
        raise FleetError(f"{path}: {error}") from None


def spec_of(table: Mapping[str, Any]) -> FleetSpec:
    values = decoded(FleetSpec, table, "")
    if "servers" in values:
        values["servers"] = tuple(group_of(i, group) for i, group in enumerate(values["servers"]))
    if not all(isinstance(value, str) for value in values.get("env", {}).values()):
        raise FleetError("env: every value must be a string")
    spec = FleetSpec(**values)
    if not spec.servers:
        raise FleetError("servers: a fleet needs at least one")
    return spec


def group_of(index: int, table: Any) -> Group:
    where = f"servers[{index}]."
    if not isinstance(table, dict):
        raise FleetError(f"servers[{index}] must be a table")
    values = decoded(Group, table, where)
    if "role" not in values:
        raise FleetError(f"{where}role is missing, expected one of {[*map(str, Role)]}")
    group = Group(**values)
    if group.count < 1:
        raise FleetError(f"{where}count must be at least 1, got {group.count}")
    if not 0 <= group.port <= 65_536 - group.count:
        raise FleetError(
            f"{where}port must leave {group.count} ports up to 65535, got {group.port}"
        )
    if group.gpus and len(group.gpus) != group.count:
        raise FleetError(f"{where}gpus names {len(group.gpus)} of {group.count} servers")
    return group


ENUMS: dict[str, type[StrEnum]] = {"role": Role, "pool": Pool, "device": Device}


def decoded(kind: type[Any], table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table's values in the types of the dataclass's fields; anything else is refused."""
    known = {one.name: one for one in fields(kind)}
    if unknown := [key for key in table if key not in known]:
        raise FleetError(f"unknown key {where}{unknown[0]}, expected one of {sorted(known)}")
    return {key: value_of(known[key], value, where + key) for key, value in table.items()}


def value_of(one: Any, value: Any, where: str) -> Any:
    if one.name in ENUMS:
        return choice_of(ENUMS[one.name], value, where)
    default = one.default if one.default is not MISSING else one.default_factory()
    if isinstance(default, tuple):
        if not isinstance(value, list):
            raise FleetError(f"{where} must be a list, got {value!r}")
        if one.name != "servers" and not all(isinstance(item, str) for item in value):
            raise FleetError(f"{where} must be a list of strings, got {value!r}")
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise FleetError(f"{where} must be {TYPES.get(type(default), 'a table')}, got {value!r}")
    return value


def choice_of(enum: type[StrEnum], value: Any, where: str) -> StrEnum:
    try:
        return enum(value)
    except ValueError:
        raise FleetError(f"{where} must be one of {[*map(str, enum)]}, got {value!r}") from None
