"""Which hardware the operator says that each server is, and the cost model that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backends.constants_file import load_constants
from gateway.predict import read_model
from gateway.settings import ConfigError
from policies.constants import Constants, ConstantsError, Key, lookup
from policies.devices import UnknownDevice, device_named
from policies.models import ModelError
from policies.roofline import CostModel, Parallel, build
from policies.shipped import SHIPPED
from policies.steps import Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What one server's steps are predicted by; what is left out is as [cost] says."""

    model: str = ""
    device: str = ""
    tp: int = 0


def beside(folder: Path, model: str) -> str:
    """A model's file is looked for beside the configuration; anything else is a known name."""
    path = folder / model
    return str(path) if model and path.exists() else model


def costs_of(constants: str, default: Hardware, own: Mapping[str, Hardware]) -> Costs:
    """The models of all servers; `own` is what the entry of each one says."""
    table = _constants(Path(constants)) if constants else SHIPPED
    by_name: dict[str, CostModel] = {}
    for name, given in own.items():
        merged = Hardware(
            model=given.model or default.model,
            device=given.device or default.device,
            tp=given.tp or default.tp,
        )
        if merged != default and (model := _built(merged, table, f"worker {name}")):
            by_name[name] = model
    return Costs(default=_built(default, table, "[cost]"), by_name=by_name)


def _constants(path: Path) -> Mapping[Key, Constants]:
    try:
        return {**SHIPPED, **load_constants(path)}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cost.constants: cannot read {path}: {error}") from error
    except ConstantsError as error:
        raise ConfigError(f"cost.constants: {error}") from error


def _built(hardware: Hardware, table: Mapping[Key, Constants], where: str) -> CostModel | None:
    """None where nobody says what the hardware is."""
    if not hardware.model and not hardware.device:
        return None
    if not hardware.model or not hardware.device:
        missing = "device" if hardware.model else "model"
        raise ConfigError(f"cost of {where}: {missing} is missing, model and device go together")
    try:
        model = read_model(hardware.model)
        device = device_named(hardware.device)
        constants = lookup(table, device.name, model.family, hardware.tp)
        return build(model, device, constants, Parallel(tp=hardware.tp))
    except (ModelError, UnknownDevice, ConstantsError) as error:
        raise ConfigError(f"cost of {where}: {error}") from error
