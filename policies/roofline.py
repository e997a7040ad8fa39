"""How long a step takes and what limits it, from the model's shape and the device's peaks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from policies.constants import Constants
from policies.devices import Device, Precision
from policies.models import Model

LARGE_STEP_TOKENS = 4096
"""From here on sustained matrix products slow down (clocks, cache)."""

ONE_SHOT_BYTES = 8 * 2**20
"""Messages below are reduced by SGLang's own kernel, from here on by the collective library."""

_LN2_INVERSE = 1 / math.log(2)
_CACHE_BYTES = {Precision.BF16: 2.0, Precision.FP8: 1.0}


class Bottleneck(StrEnum):
    COMPUTE = "compute"
    BANDWIDTH = "bandwidth"
    LINK = "link"
    OVERHEAD = "overhead"
    CAPACITY = "capacity"


class Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class DoesNotFit(ValueError):
    """The weights leave no memory for a single token."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """The time of one forward pass by term; terms that hide behind others count what shows."""

    gemm_s: float
    weights_s: float
    attention_s: float
    kv_read_s: float
    activations_s: float
    all_reduce_s: float
    fixed_s: float

    @property
    def seconds(self) -> float:
        return (
            self.gemm_s
            + self.weights_s
            + self.attention_s
            + self.kv_read_s
            + self.activations_s
            + self.all_reduce_s
            + self.fixed_s
        )

    def by_resource(self) -> dict[Bottleneck, float]:
        """Seconds that each resource is what the step waits for."""
        return {
            Bottleneck.COMPUTE: self.gemm_s + self.attention_s,
            Bottleneck.BANDWIDTH: self.weights_s + self.kv_read_s + self.activations_s,
            Bottleneck.LINK: self.all_reduce_s,
            Bottleneck.OVERHEAD: self.fixed_s,
        }

    @property
    def bottleneck(self) -> Bottleneck:
        resources = self.by_resource()
        return max(resources, key=resources.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a step works on."""

    phase: Phase
    count: int
    new_tokens: int
    context_tokens: int
    """Cached tokens that are read."""
    pairs: float
    """Of a query and a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """How one model is spread over devices."""

    tp: int = 1
    dp: int = 1
    """Replicas that share a door; each has its own requests and its own cache."""
    dp_attention: bool = False
    """The replicas share the tp devices: attention by replica, feed-forward by all (SGLang)."""

    def __post_init__(self) -> None:
        if self.tp < 1 or self.dp < 1:
            raise ValueError(f"tp {self.tp} and dp {self.dp} must be at least 1")
        if self.dp_attention and self.tp % self.dp:
            raise ValueError(f"dp attention: tp {self.tp} is not a multiple of dp {self.dp}")

    @property
    def attention_tp(self) -> int:
        return self.tp // self.dp if self.dp_attention else self.tp

    @property
    def merged(self) -> int:
        """Replicas whose tokens meet in one feed-forward block."""
        return self.dp if self.dp_attention else 1

    @property
    def devices(self) -> int:
        return self.tp if self.dp_attention else self.tp * self.dp


def prefill_batch(prompts: Iterable[tuple[int, int]]) -> Batch:
    """A chunk batch; each prompt is (new tokens, tokens already cached)."""
    count = new_tokens = context = 0
    pairs = 0.0
    for new, cached in prompts:
        count += 1
        new_tokens += new
        context += cached
        pairs += new * (cached + 0.5 * (new + 1))
    return Batch(
        phase=Phase.PREFILL,
        count=count,
        new_tokens=new_tokens,
        context_tokens=context,
        pairs=pairs,
    )


def decode_batch(count: int, context_tokens: int) -> Batch:
    """One step of `count` sequences with `context_tokens` in all their caches together."""
    return Batch(
        phase=Phase.DECODE,
        count=count,
        new_tokens=count,
        context_tokens=context_tokens,
        pairs=context_tokens,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Coefficients of one (model, device, parallelism); every prediction is a few products."""

    token_gemm_s: float
    head_gemm_s: float
    tile_tokens: int
    large_step_slowdown: float
    fixed_weights_s: float
    expert_weights_s: float
    expert_miss: float
    """The chance that one token leaves a given expert alone."""
    exposed: float
    pair_s: float
    decode_pair_s: float
    cached_token_s: float
    few_sequences_penalty: float
    sequences_per_wave: float
    token_activation_s: float
    token_all_reduce_s: float
    large_reduce_tokens: int
    large_reduce_s: float
    prefill_fixed_s: float
    decode_fixed_s: float
    sequence_s: float
    kv_bytes_per_token: float
    """Of one replica, all its devices together."""
    kv_device_bytes_per_token: float
    weight_bytes_per_device: float
    memory_bytes_per_device: float
    network_bytes_per_s: float
    """Out of one replica, all its devices together."""
    replicas: int
    source: str

    def prefill(self, prompts: Iterable[tuple[int, int]]) -> StepCost:
        return self.cost(prefill_batch(prompts))

    def prefill_one(self, new_tokens: int, cached_tokens: int = 0) -> StepCost:
        pairs = new_tokens * (cached_tokens + 0.5 * (new_tokens + 1))
        return self.prefill_sums(1, new_tokens, cached_tokens, pairs)

    def prefill_sums(
        self, count: int, new_tokens: int, context_tokens: int, pairs: float
    ) -> StepCost:
        gemm, weights = self._linear(new_tokens, count)
        compute, read = pairs * self.pair_s, context_tokens * self.cached_token_s
        return StepCost(
            gemm,
            weights,
            compute if compute >= read else 0.0,
            read if read > compute else 0.0,
            new_tokens * self.token_activation_s,
            self._all_reduce(new_tokens),
            self.prefill_fixed_s,
        )

    def decode(self, count: int, context_tokens: int) -> StepCost:
        gemm, weights = self._linear(count, count)
        wave = count / self.sequences_per_wave
        read = (
            context_tokens
            * self.cached_token_s
            * (1 + self.few_sequences_penalty / (1 + wave * wave))
        )
        compute = context_tokens * self.decode_pair_s
        return StepCost(
            gemm,
            weights,
            compute if compute > read else 0.0,
            read if read >= compute else 0.0,
            count * self.token_activation_s,
            count * self.token_all_reduce_s,
            self.decode_fixed_s + count * self.sequence_s,
        )

    def decode_contexts(self, contexts: Iterable[int]) -> StepCost:
        lengths = tuple(contexts)
        return self.decode(len(lengths), sum(lengths))

    def cost(self, batch: Batch) -> StepCost:
        if batch.phase is Phase.DECODE:
            return self.decode(batch.count, batch.context_tokens)
        return self.prefill_sums(batch.count, batch.new_tokens, batch.context_tokens, batch.pairs)

    def _gemm(self, tokens: int) -> float:
        padded = -(-tokens // self.tile_tokens) * self.tile_tokens
        gemm = padded * self.token_gemm_s
        if tokens > LARGE_STEP_TOKENS:
            doublings = math.log(tokens / LARGE_STEP_TOKENS) * _LN2_INVERSE
            gemm *= 1 + self.large_step_slowdown * doublings
        return gemm

    def weight_read_s(self, tokens: int) -> float:
        """All weights, but of the experts only those that some token is expected to use."""
        if not self.expert_weights_s:
            return self.fixed_weights_s
        return self.fixed_weights_s + self.expert_weights_s * (1 - self.expert_miss**tokens)

    def _all_reduce(self, tokens: int) -> float:
        latency = self.large_reduce_s if tokens >= self.large_reduce_tokens else 0.0
        return tokens * self.token_all_reduce_s + latency

    def _linear(self, tokens: int, heads: int) -> tuple[float, float]:
        gemm = self._gemm(tokens) + heads * self.head_gemm_s
        weights = self.weight_read_s(tokens)
        if gemm >= weights:
            return gemm, weights * self.exposed
        return gemm * self.exposed, weights


def build(
    model: Model,
    device: Device,
    constants: Constants,
    parallel: Parallel | None = None,
    kv_cache: Precision = Precision.BF16,
) -> CostModel:
    """Works out the coefficients once; the arithmetic is in docs/cost-model.md."""
    spread = parallel or Parallel()
    tp, attention_tp, merged = spread.tp, spread.attention_tp, spread.merged
    if model.attention.heads % attention_tp:
        raise ValueError(f"{model.attention.heads} heads cannot be shared by tp {attention_tp}")
    shard = _shard(model, tp, attention_tp)
    flops = device.flops(model.weights) * constants.gemm_efficiency
    attention_flops = device.bf16_flops * constants.attention_efficiency / model.layers
    bandwidth = device.memory_bytes_per_s
    weight_bandwidth = bandwidth * constants.weight_efficiency
    experts = model.experts
    kv_heads = max(1, model.attention.kv_heads // attention_tp)
    kv_values = model.layers * model.attention.kv_values * kv_heads / model.attention.kv_heads
    kv_device_bytes = kv_values * _cache_bytes(kv_cache)
    reduces = 2 * model.layers if tp > 1 else 0
    latency_s = reduces * constants.all_reduce_us * 1e-6
    activation = merged * 2 * _activation_values(model, tp, attention_tp) / bandwidth
    return CostModel(
        token_gemm_s=2 * (shard.attention + merged * shard.token_feed_forward) / flops,
        head_gemm_s=2 * merged * shard.head / (device.bf16_flops * constants.gemm_efficiency),
        tile_tokens=device.gemm_tile_tokens,
        large_step_slowdown=constants.large_step_slowdown,
        fixed_weights_s=(model.weight_bytes * (shard.attention + shard.fixed) + 2 * shard.head)
        / weight_bandwidth,
        expert_weights_s=model.weight_bytes * shard.experts / weight_bandwidth,
        expert_miss=(1 - experts.per_token / experts.total) ** merged if experts else 1.0,
        exposed=constants.exposed,
        pair_s=model.attention.pair_flops / attention_tp / attention_flops,
        decode_pair_s=model.attention.decode_pair_flops / attention_tp / attention_flops,
        cached_token_s=kv_device_bytes / (bandwidth * constants.kv_efficiency),
        few_sequences_penalty=constants.few_sequences_penalty,
        sequences_per_wave=2 * device.cores / kv_heads,
        token_activation_s=activation * constants.activation_factor,
        token_all_reduce_s=merged
        * (2 * model.layers * model.hidden * 2)
        * (2 * (tp - 1) / tp)
        / (device.link_bytes_per_s * constants.link_efficiency),
        large_reduce_tokens=ONE_SHOT_BYTES // (2 * model.hidden * merged),
        large_reduce_s=reduces * constants.large_all_reduce_us * 1e-6,
        prefill_fixed_s=model.layers * constants.prefill_layer_us * 1e-6 + latency_s,
        decode_fixed_s=model.layers * constants.decode_layer_us * 1e-6 + latency_s,
        sequence_s=model.layers * constants.sequence_layer_us * 1e-6,
        kv_bytes_per_token=model.layers * model.attention.kv_values * _cache_bytes(kv_cache),
        kv_device_bytes_per_token=kv_device_bytes,
        weight_bytes_per_device=_weight_bytes(model, shard),
        memory_bytes_per_device=device.memory_bytes,
        network_bytes_per_s=device.network_bytes_per_s * attention_tp,
        replicas=spread.dp,
        source=constants.source,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """Parameters on one device."""

    attention: float
    fixed: float
    token_feed_forward: float
    experts: float
    head: float


def _shard(model: Model, tp: int, attention_tp: int) -> _Shard:
    fixed = model.dense_layers * model.dense_params + model.expert_layers * model.shared_params
    experts = model.experts
    per_token = model.expert_layers * experts.per_token * experts.params if experts else 0
    total = model.expert_layers * experts.total * experts.params if experts else 0
    return _Shard(
        attention=model.layers * model.attention.params / attention_tp,
        fixed=fixed / tp,
        token_feed_forward=(fixed + per_token) / tp,
        experts=total / tp,
        head=model.head_params / tp,
    )


def _activation_values(model: Model, tp: int, attention_tp: int) -> float:
    """Numbers moved between kernels per token: the residual stream whole, the rest sharded."""
    width = model.dense_layers * model.dense_width + model.expert_layers * model.shared_width
    if model.experts:
        width += model.expert_layers * model.experts.per_token * model.experts.width
    stream = 8 * model.layers * model.hidden
    return stream + model.layers * model.attention.io_values / attention_tp + 3 * width / tp


def _weight_bytes(model: Model, shard: _Shard) -> float:
    linear = shard.attention + shard.fixed + shard.experts
    return model.weight_bytes * linear + 2 * shard.head * (1 if model.tied_head else 2)


def _cache_bytes(precision: Precision) -> float:
    if precision not in _CACHE_BYTES:
        raise ValueError(f"a {precision} cache is unknown, expected bf16 or fp8")
    return _CACHE_BYTES[precision]
