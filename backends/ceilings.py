"""What this machine's own kernels reach at a model's shapes, measured with torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import ModuleType
from typing import Any

from policies.constants import Constants, check
from policies.devices import Device
from policies.models import Model

Seconds = Callable[[], float]
"""Reads a monotonic clock."""


class CeilingsError(RuntimeError):
    """Nothing could be measured, or what was measured cannot be true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Speeds that kernels reach here."""

    where: str
    copy_bytes_per_s: float
    gemm_flops: float
    attention_flops: float
    kv_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured at once: enough to be busy, little enough to be quick."""

    copy_values: int
    gemm_tokens: int
    prompt_tokens: int
    decode_sequences: int
    decode_tokens: int


GPU_SIZES = Sizes(
    copy_values=1 << 28,
    gemm_tokens=4096,
    prompt_tokens=8192,
    decode_sequences=64,
    decode_tokens=4096,
)
CPU_SIZES = Sizes(
    copy_values=1 << 24,
    gemm_tokens=64,
    prompt_tokens=256,
    decode_sequences=4,
    decode_tokens=512,
)


def find_torch() -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise CeilingsError(
            f"torch cannot be imported ({error}): --torch needs it installed beside slackwater"
        ) from error


def measure(model: Model, tp: int, now: Seconds, sizes: Sizes | None = None) -> Ceilings:
    """On the first GPU in bf16, or on the CPU in float32 where there is none."""
    torch = find_torch()
    gpu = torch.cuda.is_available()
    kernels = _Kernels(
        torch=torch,
        now=now,
        device="cuda" if gpu else "cpu",
        dtype=torch.bfloat16 if gpu else torch.float32,
        sizes=sizes or (GPU_SIZES if gpu else CPU_SIZES),
    )
    heads, kv_heads, size = _heads(model, tp)
    return Ceilings(
        where=torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        copy_bytes_per_s=kernels.copy(),
        gemm_flops=kernels.gemm(model, tp),
        attention_flops=kernels.prefill_attention(heads, kv_heads, size),
        kv_bytes_per_s=kernels.decode_attention(heads, kv_heads, size),
    )


def _heads(model: Model, tp: int) -> tuple[int, int, int]:
    """Query heads and key-value heads of one device, and the size of each."""
    attention = model.attention
    if attention.pair_flops != attention.decode_pair_flops:
        raise CeilingsError(f"{model.name}: compressed attention (MLA) has no ceiling test yet")
    size = attention.kv_values // (2 * attention.kv_heads)
    heads = attention.io_values // 2 // size
    if heads % tp:
        raise CeilingsError(f"{heads} heads cannot be spread over tp {tp}")
    return heads // tp, max(1, attention.kv_heads // tp), size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernels:
    torch: Any
    now: Seconds
    device: str
    dtype: Any
    sizes: Sizes

    def _random(self, *shape: int) -> Any:
        return self.torch.randn(*shape, dtype=self.dtype, device=self.device)

    def _bytes(self) -> int:
        return int(self.torch.empty(0, dtype=self.dtype).element_size())

    def _seconds(self, kernel: Callable[[], object]) -> float:
        """The median of at least five calls that take a fifth of a second together."""
        kernel()
        self._wait()
        times: list[float] = []
        while len(times) < 5 or (sum(times) < 0.2 and len(times) < 200):
            start = self.now()
            kernel()
            self._wait()
            times.append(self.now() - start)
        return max(median(times), 1e-9)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def copy(self) -> float:
        source = self._random(self.sizes.copy_values)
        target = self.torch.empty_like(source)
        moved = 2 * self.sizes.copy_values * self._bytes()
        return moved / self._seconds(lambda: target.copy_(source))

    def gemm(self, model: Model, tp: int) -> float:
        """The linear layers of one block, each with its own shape, as one rate."""
        attention, hidden = model.attention, model.hidden
        width = model.dense_width or (model.experts.width if model.experts else 0)
        heads = attention.io_values // 2 // tp
        shapes = (
            (hidden, heads + attention.kv_values // tp),
            (heads, hidden),
            (hidden, 2 * width // tp),
            (width // tp, hidden),
        )
        flops = seconds = 0.0
        for inner, outer in shapes:
            left, right = self._random(self.sizes.gemm_tokens, inner), self._random(inner, outer)
            seconds += self._seconds(partial(self.torch.matmul, left, right))
            flops += 2.0 * self.sizes.gemm_tokens * inner * outer
        return flops / seconds

    def prefill_attention(self, heads: int, kv_heads: int, size: int) -> float:
        length = self.sizes.prompt_tokens
        query = self._random(1, heads, length, size)
        key, value = (
            self._random(1, kv_heads, length, size).repeat_interleave(heads // kv_heads, dim=1)
            for _ in range(2)
        )
        attend = self.torch.nn.functional.scaled_dot_product_attention
        seconds = self._seconds(lambda: attend(query, key, value, is_causal=True))
        return 4 * heads * size * length * (length + 1) / 2 / seconds

    def decode_attention(self, heads: int, kv_heads: int, size: int) -> float:
        count, length = self.sizes.decode_sequences, self.sizes.decode_tokens
        query = self._random(count, kv_heads, heads // kv_heads, size)
        key, value = (self._random(count, kv_heads, length, size) for _ in range(2))
        attend = self.torch.nn.functional.scaled_dot_product_attention
        seconds = self._seconds(lambda: attend(query, key, value))
        return 2 * count * kv_heads * length * size * self._bytes() / seconds


def constants_from(ceilings: Ceilings, device: Device, prior: Constants) -> Constants:
    """The measured ceilings as efficiencies; overheads, which they do not show, stay as before."""
    shares = {
        "gemm_efficiency": ceilings.gemm_flops / device.bf16_flops,
        "attention_efficiency": ceilings.attention_flops / device.bf16_flops,
        "weight_efficiency": ceilings.copy_bytes_per_s / device.memory_bytes_per_s,
        "kv_efficiency": ceilings.kv_bytes_per_s / device.memory_bytes_per_s,
    }
    for name, share in shares.items():
        if share > 1:
            raise CeilingsError(
                f"{name}: {ceilings.where} reaches {share:.2f} times the peak of {device.name}: "
                f"is --gpu right?"
            )
    limited = {
        name: min(share, 0.95) if name == "gemm_efficiency" else share
        for name, share in shares.items()
    }
    source = f"ceilings measured with torch on {ceilings.where}; overheads: {prior.source}"
    return check(replace(prior, source=source, **limited))
