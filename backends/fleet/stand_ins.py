"""What SGLang imports and never calls on a CPU, so that it starts without CUDA packages.

Runs inside the interpreter that has SGLang, before SGLang is imported. Nothing of SGLang's files
changes: two packages are replaced by hollow modules, two operators get their schemas, and one
class attribute is set.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HOLLOW = ("triton", "sgl_kernel")


class HollowModule(ModuleType):
    """Hands out whatever is asked of it: classes to inherit from, decorators that do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = SPECIAL.get(name) or (_hollow_class(name) if name[0].isupper() else None)
        if value is None:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Decorates, with or without arguments; a kernel must never run, so its call raises."""
        if self.__name__.startswith("sgl_kernel"):
            raise RuntimeError(f"{self.__name__} was called, but there is no native kernel here")
        if len(args) == 1 and callable(args[0]) and not options:
            return args[0]
        return lambda function: function


class HollowFinder:
    """Answers every import below the hollow packages."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in HOLLOW:
            return None
        spec = ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        spec.submodule_search_locations = []
        return spec

    def create_module(self, spec: ModuleSpec) -> HollowModule:
        return HollowModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "triton":
            module.__version__ = "3.0.0"  # type: ignore[attr-defined]


class Constexpr:
    """Triton's compile-time constant, used as an annotation and around literals."""

    def __init__(self, value: object = None) -> None:
        self.value = value


class HollowClass(Exception):
    """Built with anything; an exception, so that it may stand in an `except` clause too."""

    def __init__(self, *_args: object, **_options: object) -> None:
        super().__init__()


def _hollow_class(name: str) -> type:
    return type(name, (HollowClass,), {})


def _ceiling_division(a: int, b: int) -> int:
    return -(a // -b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 1


SPECIAL: dict[str, type | Callable[..., object]] = {
    "constexpr": Constexpr,
    "dtype": type("dtype", (), {}),
    "cdiv": _ceiling_division,
    "next_power_of_2": _next_power_of_2,
    "triton_key": lambda: "hollow",
}


def import_torch() -> Any:
    """Torch, with what it and torchvision ask for at import in place.

    Torchvision's own operators are built for CUDA; its Python part needs their schemas only.
    """
    if not any(isinstance(finder, HollowFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, HollowFinder())
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.slackwater_operators = library  # its end would take the operators with it
    return torch


def send_plain_indices() -> None:
    """Page indices in pinned memory behind a CUDA event would end a prefill server here."""
    conn: Any = importlib.import_module("sglang.srt.disaggregation.mooncake.conn")
    conn.MooncakeKVSender.supports_host_tensor_indices = False
