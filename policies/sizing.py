"""What a server holds: saturation, capacity, the batch inside a target, the length worth adding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from policies.devices import Device
from policies.models import Model
from policies.roofline import Bottleneck, CostModel, DoesNotFit

STATIC_FRACTION = 0.85
"""Share of the memory for weights and cache; the rest is activations, graphs and the runtime."""

LARGEST_BATCH = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimit:
    """The most sequences that fit, and what one more would break."""

    count: int
    limited_by: Bottleneck


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Moving a prompt's cache from a prefill server to a decode server."""

    kv_bytes: float
    wire_s: float
    latency_s: float

    @property
    def seconds(self) -> float:
        return self.wire_s + self.latency_s


def capacity_tokens(cost: CostModel, static_fraction: float = STATIC_FRACTION) -> int:
    """Cache tokens of one replica."""
    free = cost.memory_bytes_per_device * static_fraction - cost.weight_bytes_per_device
    tokens = int(free / cost.kv_device_bytes_per_token)
    if tokens < 1:
        weights, memory = cost.weight_bytes_per_device, cost.memory_bytes_per_device
        raise DoesNotFit(
            f"weights take {weights / 2**30:.1f} GiB of each device's {memory / 2**30:.1f} GiB, "
            f"of which {static_fraction:.0%} may be used: raise tp"
        )
    return tokens


def transfer(
    cost: CostModel,
    tokens: int,
    *,
    bytes_per_s: float | None = None,
    latency_s: float = 0.0,
) -> Transfer:
    """Over the replica's network, or over a link of the given speed."""
    kv_bytes = tokens * cost.kv_bytes_per_token
    speed = cost.network_bytes_per_s if bytes_per_s is None else bytes_per_s
    if speed <= 0:
        raise ValueError(f"a link of {speed} bytes/s moves nothing")
    return Transfer(kv_bytes=kv_bytes, wire_s=kv_bytes / speed, latency_s=latency_s)


def greatest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The greatest number in [low, high] that fits, or low - 1; whatever fits, less fits too."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def saturation_batch(cost: CostModel) -> int:
    """The smallest batch whose linear layers are bound by arithmetic, leaving tiles aside."""

    def memory_bound(tokens: int) -> bool:
        return tokens * cost.token_gemm_s < cost.weight_read_s(tokens)

    return min(LARGEST_BATCH, greatest(memory_bound, 1, LARGEST_BATCH) + 1)


KNEE_SHARE = 0.99
SHORT_TOKENS = 256
"""Of the prompts that share a batch, by which its attention is reckoned."""


def throughput_knee(cost: CostModel, chunk_tokens: int, share: float = KNEE_SHARE) -> int:
    """The fewest prompt tokens in a batch that reach a share of the best tokens a second."""
    sizes = [*range(SHORT_TOKENS, chunk_tokens, SHORT_TOKENS), chunk_tokens]
    rates = [size / _batch_s(cost, size) for size in sizes]
    wanted = share * max(rates)
    reached = (size for size, rate in zip(sizes, rates, strict=True) if rate >= wanted)
    return int(next(reached))


def _batch_s(cost: CostModel, tokens: int) -> float:
    count = max(1, tokens // SHORT_TOKENS)
    return cost.prefill_sums(count, tokens, 0, 0.5 * tokens * SHORT_TOKENS).seconds


def linear_saturation_batch(
    model: Model,
    device: Device,
    *,
    tp: int = 1,
    gemm_efficiency: float = 1.0,
    memory_efficiency: float = 1.0,
) -> int:
    """OOCO's saturation batch as printed: the last linear operator to pass the ridge."""
    ridge = device.flops(model.weights) * gemm_efficiency
    ridge /= device.memory_bytes_per_s * memory_efficiency
    size = model.weight_bytes
    return max(_passes_ridge(inner, outer, ridge, size) for inner, outer in _operators(model, tp))


def _operators(model: Model, tp: int) -> Iterable[tuple[float, float]]:
    hidden, heads = model.hidden, model.attention.io_values / 2 / tp
    width = (model.dense_width or (model.experts.width if model.experts else 0)) / tp
    yield hidden, heads + model.attention.kv_values / tp
    yield heads, hidden
    yield hidden, width
    yield width, hidden


def _passes_ridge(inner: float, outer: float, ridge: float, size: float) -> int:
    """min b with 2·b·i·o ≥ ridge·size·(b·(i+o) + i·o); operators too small never get there."""
    gain = 2 * inner * outer / size - ridge * (inner + outer)
    if gain <= 0:
        return LARGEST_BATCH
    return min(LARGEST_BATCH, -int(-(ridge * inner * outer) // gain))


def largest_batch(
    cost: CostModel, context_tokens: int, step_s: float, kv_tokens: int
) -> BatchLimit:
    """The most sequences of one length that decode within `step_s` and fit into `kv_tokens`."""
    seats = min(LARGEST_BATCH, kv_tokens // max(1, context_tokens))
    count = greatest(lambda n: cost.decode(n, n * context_tokens).seconds <= step_s, 1, seats)
    if count == seats:
        return BatchLimit(count=count, limited_by=Bottleneck.CAPACITY)
    next_step = cost.decode(count + 1, (count + 1) * context_tokens)
    return BatchLimit(count=count, limited_by=next_step.bottleneck)


def preferred_length(
    cost: CostModel,
    count: int,
    context_tokens: int,
    *,
    saturation: int,
    step_s: float,
    free_tokens: int,
) -> int:
    """OOCO: the longest that newcomers may be if they fill a batch up to saturation; 0 if none."""
    seats = max(saturation - count, 1)
    full = count + seats
    return max(
        0,
        greatest(
            lambda length: cost.decode(full, context_tokens + seats * length).seconds <= step_s,
            1,
            free_tokens // seats,
        ),
    )
