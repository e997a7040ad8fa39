"""How far real kernels stay behind the peaks: the constants of the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType


class ConstantsError(ValueError):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Fourteen numbers; each is physical, so that one that makes no sense can be seen."""

    gemm_efficiency: float
    """Share of the peak that a large matrix product reaches."""
    large_step_slowdown: float
    """How much slower a token's products get per doubling of a step beyond 4096 tokens."""
    attention_efficiency: float
    """Share of the peak that prefill attention reaches."""
    weight_efficiency: float
    """Share of the memory bandwidth at which weights are read."""
    kv_efficiency: float
    """Share of the memory bandwidth at which decode attention reads the cache."""
    few_sequences_penalty: float
    """How much longer the cache read takes when too few sequences leave cores idle."""
    exposed: float
    """Share of the lesser of arithmetic and weight reads that is not hidden behind the greater."""
    activation_factor: float
    """Times the bytes between kernels are moved, relative to one write and one read."""
    link_efficiency: float
    """Share of the link bandwidth that an all-reduce reaches."""
    all_reduce_us: float
    """Latency of one all-reduce."""
    large_all_reduce_us: float
    """Further latency of one whose message is too large for the one-shot kernels."""
    prefill_layer_us: float
    """Fixed time per layer of a prefill step."""
    decode_layer_us: float
    """Fixed time per layer of a decode step."""
    sequence_layer_us: float
    """Further time per layer for each decoding sequence."""
    source: str = "unstated"


NUMBERS: tuple[str, ...] = tuple(f.name for f in fields(Constants) if f.name != "source")

BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "gemm_efficiency": (0.001, 0.95),
        "large_step_slowdown": (0.001, 0.4),
        "attention_efficiency": (0.001, 1.0),
        "weight_efficiency": (0.001, 1.0),
        "kv_efficiency": (0.001, 1.0),
        "few_sequences_penalty": (0.001, 1.5),
        "exposed": (0.01, 1.0),
        "activation_factor": (0.1, 4.0),
        "link_efficiency": (0.001, 1.0),
        "all_reduce_us": (0.1, 200.0),
        "large_all_reduce_us": (0.1, 500.0),
        "prefill_layer_us": (0.1, 5000.0),
        "decode_layer_us": (0.1, 5000.0),
        "sequence_layer_us": (0.0001, 500.0),
    }
)
"""What a machine can be believed to do; a fit stays inside, a file outside is refused."""

PEAK = Constants(
    gemm_efficiency=1.0,
    large_step_slowdown=0.0,
    attention_efficiency=1.0,
    weight_efficiency=1.0,
    kv_efficiency=1.0,
    few_sequences_penalty=0.0,
    exposed=0.0,
    activation_factor=0.0,
    link_efficiency=1.0,
    all_reduce_us=0.0,
    large_all_reduce_us=0.0,
    prefill_layer_us=0.0,
    decode_layer_us=0.0,
    sequence_layer_us=0.0,
    source="peaks alone, no real machine reaches them",
)


def check(constants: Constants) -> Constants:
    """Refuses numbers that no machine has."""
    for name in NUMBERS:
        low, high = BOUNDS[name]
        value = getattr(constants, name)
        if not low * 0.999 <= value <= high * 1.001:
            raise ConstantsError(f"{name} = {value} is outside of {low} to {high}")
    return constants


Key = tuple[str, str, int]
"""Device, model family, tensor parallelism; the family '*' with 0 is the device's default."""

ANY = "*"


def lookup(table: Mapping[Key, Constants], device: str, family: str, tp: int) -> Constants:
    """The most specific constants that a table has; no device is given another one's silently."""
    for key in ((device, family, tp), (device, ANY, 0)):
        if key in table:
            return table[key]
    known = sorted({key[0] for key in table})
    raise ConstantsError(f"no constants for device {device!r}, known are {known}: calibrate first")
