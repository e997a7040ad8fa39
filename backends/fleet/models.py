"""Where a fleet's model lies on disk, made on first use."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from backends.fleet import interpreter
from backends.fleet.spec import Device, FleetError, FleetSpec

RECIPE = 1
"""Part of a made model's folder name, so that a changed recipe makes a new one."""
MISSING_PACKAGE = 3
MADE = ("tiny", "smollm2")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slackwater"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a server keeps in memory of a model."""

    weight_bytes: int
    kv_bytes_per_token: int


async def model_path(spec: FleetSpec, python: str) -> str:
    """The directory (or the name that SGLang downloads); makes `tiny` and `smollm2`."""
    if spec.model in MADE:
        folder = cache_folder() / "models" / f"{spec.model}-{RECIPE}"
        if not (folder / "config.json").is_file():
            await make(spec.model, folder, python)
        return str(folder)
    return given_path(spec)


def given_path(spec: FleetSpec) -> str:
    path = Path(spec.model).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve())
    if path.is_dir():
        raise FleetError(f"model directory {path} has no config.json")
    if spec.device is Device.CPU or spec.model.startswith((".", "/", "~")):
        raise FleetError(
            f"model directory {path} does not exist; made here are {' and '.join(MADE)}"
        )
    return spec.model


async def make(name: str, folder: Path, python: str) -> None:
    """Beside its place first, then renamed: a half-made model is never found."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = tempfile.mkdtemp(prefix=f"{name}-", dir=folder.parent)
    try:
        code, told = await interpreter.run(python, "backends.fleet.recipes", name, beside)
        if code == MISSING_PACKAGE:
            raise FleetError(interpreter.missing_package(told.strip().rpartition("\n")[2], python))
        if code != 0:
            raise FleetError(f"making the model {name} failed:\n{told[-2000:]}")
        await asyncio.to_thread(os.replace, beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def shape(path: str) -> Shape | None:
    """In float32, as the CPU serves it; None when the directory does not tell."""
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        return None
    config = json.loads(config_file.read_text())
    try:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        kv_bytes = config["num_hidden_layers"] * heads * width * 2 * 4
    except KeyError:
        return None
    weights = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    return Shape(weight_bytes=weights, kv_bytes_per_token=kv_bytes)
