"""The shape of a transformer as its cost sees it, read from a Hugging Face config.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from policies.devices import Precision
from policies.known_models import KNOWN_CONFIGS

Config = Mapping[str, Any]


class ModelError(ValueError):
    """The configuration cannot be turned into a cost, and the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention: its weights, its cache, and the work per query and key pair."""

    params: int
    heads: int
    kv_heads: int
    """1 where all heads share one compressed cache (MLA)."""
    kv_values: int
    """Cached numbers per token, all heads together."""
    pair_flops: int
    """Prefill: one query against one key, all heads."""
    decode_pair_flops: int
    """Decode: larger where the kernel works on the compressed cache (MLA)."""
    io_values: int
    """Numbers per token that the kernel reads and writes besides the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The routed experts of one layer."""

    total: int
    per_token: int
    params: int
    """Of one expert."""
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Everything the cost of a step depends on; sizes are those of the whole, unsharded model."""

    name: str
    family: str
    layers: int
    hidden: int
    vocabulary: int
    tied_head: bool
    attention: Attention
    dense_layers: int
    """Layers with an ordinary feed-forward block."""
    dense_params: int
    dense_width: int
    shared_params: int = 0
    """Per expert layer: what every token passes through besides its experts, router included."""
    shared_width: int = 0
    experts: Experts | None = None
    weights: Precision = Precision.BF16
    weight_bytes: float = 2.0
    """Per parameter of the linear layers, scales included."""

    @property
    def head_params(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def expert_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def linear_params(self) -> int:
        """All linear layers without the embedding and the head."""
        routed = self.experts.total * self.experts.params if self.experts else 0
        return (
            self.layers * self.attention.params
            + self.dense_layers * self.dense_params
            + self.expert_layers * (self.shared_params + routed)
        )

    @property
    def params(self) -> int:
        return self.linear_params + self.head_params * (1 if self.tied_head else 2)

    @property
    def active_params(self) -> int:
        """What one token passes through, the head included."""
        routed = self.experts.per_token * self.experts.params if self.experts else 0
        return (
            self.layers * self.attention.params
            + self.dense_layers * self.dense_params
            + self.expert_layers * (self.shared_params + routed)
            + self.head_params
        )


def _positive(config: Config, field: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        what = "lacks" if value is None else f"has {value!r} as"
        raise ModelError(f"config.json {what} {field!r}, a positive whole number is needed")
    return value


def _optional(config: Config, field: str, default: int) -> int:
    return default if config.get(field) is None else _positive(config, field)


def _grouped(config: Config) -> Attention:
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    kv_heads = _optional(config, "num_key_value_heads", heads)
    size = _optional(config, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads cannot share {kv_heads} key-value heads")
    return Attention(
        params=hidden * size * (2 * heads + 2 * kv_heads),
        heads=heads,
        kv_heads=kv_heads,
        kv_values=2 * kv_heads * size,
        pair_flops=4 * heads * size,
        decode_pair_flops=4 * heads * size,
        io_values=2 * heads * size,
    )


def _latent(config: Config) -> Attention:
    """Multi-head latent attention; the cache holds one compressed vector for all heads."""
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    rank, rope = _positive(config, "kv_lora_rank"), _positive(config, "qk_rope_head_dim")
    nope, value = _positive(config, "qk_nope_head_dim"), _positive(config, "v_head_dim")
    query = heads * (nope + rope)
    query_rank = config.get("q_lora_rank")
    query_params = hidden * query
    if query_rank is not None:
        query_params = _positive(config, "q_lora_rank") * (hidden + query)
    key_params = hidden * (rank + rope) + rank * heads * (nope + value)
    return Attention(
        params=query_params + key_params + heads * value * hidden,
        heads=heads,
        kv_heads=1,
        kv_values=rank + rope,
        pair_flops=2 * heads * (nope + rope + value),
        decode_pair_flops=2 * heads * (2 * rank + rope),
        io_values=query + heads * value,
    )


def _dense(config: Config) -> dict[str, Any]:
    hidden, width = _positive(config, "hidden_size"), _positive(config, "intermediate_size")
    layers = _positive(config, "num_hidden_layers")
    return {
        "attention": _grouped(config),
        "dense_layers": layers,
        "dense_params": 3 * hidden * width,
        "dense_width": width,
    }


def _routed(config: Config, total: str, width: str) -> Experts:
    inner = _positive(config, width)
    experts = Experts(
        total=_positive(config, total),
        per_token=_positive(config, "num_experts_per_tok"),
        params=3 * _positive(config, "hidden_size") * inner,
        width=inner,
    )
    if experts.per_token > experts.total:
        raise ModelError(f"{experts.per_token} experts per token, but only {experts.total} exist")
    return experts


def _qwen_moe(config: Config) -> dict[str, Any]:
    hidden, layers = _positive(config, "hidden_size"), _positive(config, "num_hidden_layers")
    experts = _routed(config, "num_experts", "moe_intermediate_size")
    every = _optional(config, "decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    sparse = sum(1 for i in range(layers) if i not in dense and (i + 1) % every == 0)
    width = _optional(config, "intermediate_size", 1) if sparse < layers else 0
    return {
        "attention": _grouped(config),
        "dense_layers": layers - sparse,
        "dense_params": 3 * hidden * width,
        "dense_width": width,
        "shared_params": hidden * experts.total,
        "experts": experts,
    }


def _mixtral(config: Config) -> dict[str, Any]:
    experts = _routed(config, "num_local_experts", "intermediate_size")
    return {
        "attention": _grouped(config),
        "dense_layers": 0,
        "dense_params": 0,
        "dense_width": 0,
        "shared_params": _positive(config, "hidden_size") * experts.total,
        "experts": experts,
    }


def _deepseek(config: Config) -> dict[str, Any]:
    hidden, layers = _positive(config, "hidden_size"), _positive(config, "num_hidden_layers")
    width = _positive(config, "intermediate_size")
    experts = _routed(config, "n_routed_experts", "moe_intermediate_size")
    shared = experts.width * int(config.get("n_shared_experts") or 0)
    return {
        "attention": _latent(config),
        "dense_layers": min(layers, int(config.get("first_k_dense_replace") or 0)),
        "dense_params": 3 * hidden * width,
        "dense_width": width,
        "shared_params": 3 * hidden * shared + hidden * experts.total,
        "shared_width": shared,
        "experts": experts,
    }


ARCHITECTURES: dict[str, tuple[str, Callable[[Config], dict[str, Any]]]] = {
    "LlamaForCausalLM": ("llama", _dense),
    "MistralForCausalLM": ("mistral", _dense),  # SGLang serves it as Llama: no sliding window
    "Qwen2ForCausalLM": ("qwen2", _dense),
    "Qwen3ForCausalLM": ("qwen3", _dense),
    "Qwen3MoeForCausalLM": ("qwen3-moe", _qwen_moe),
    "MixtralForCausalLM": ("mixtral", _mixtral),
    "DeepseekV2ForCausalLM": ("deepseek", _deepseek),
    "DeepseekV3ForCausalLM": ("deepseek", _deepseek),
}

_GROUP_SCALE_BYTES = 2.5 / 128
"""A 16-bit scale and a 4-bit zero point for each group of 128."""


def _bits(quantization: Config) -> int:
    bits = quantization.get("bits", quantization.get("w_bit"))
    if bits is None:
        groups = quantization.get("config_groups") or {}
        found = {g["weights"]["num_bits"] for g in groups.values() if g.get("weights")}
        bits = found.pop() if len(found) == 1 else None
    if bits not in (4, 8):
        raise ModelError(f"quantization_config: {bits!r} bits per weight, 4 or 8 are known")
    return int(bits)


def _precision(config: Config) -> tuple[Precision, float]:
    quantization = config.get("quantization_config")
    if not quantization:
        return Precision.BF16, 2.0
    method = str(quantization.get("quant_method", "")).lower()
    if method in ("fp8", "fbgemm_fp8", "modelopt"):
        return Precision.FP8, 1.0
    if method not in ("awq", "gptq", "gptq_marlin", "compressed-tensors"):
        raise ModelError(f"quantization method {method!r} is unknown: bf16, fp8 and int4 are known")
    if _bits(quantization) == 4:
        return Precision.INT4, 0.5 + _GROUP_SCALE_BYTES
    floating = "float" in str(quantization)
    return (Precision.FP8 if floating else Precision.INT8), 1.0


_OVERRIDES: dict[Precision, float] = {
    Precision.BF16: 2.0,
    Precision.FP8: 1.0,
    Precision.INT8: 1.0,
    Precision.INT4: 0.5 + _GROUP_SCALE_BYTES,
}


def parse_config(config: Config, name: str = "", weights: Precision | None = None) -> Model:
    """Reads a config.json; `weights` overrides what it says about quantization."""
    architectures = config.get("architectures")
    if not architectures:
        raise ModelError("config.json lacks 'architectures'")
    architecture = str(architectures[0])
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(f"architecture {architecture!r} is unknown, known are {known}")
    family, shape = ARCHITECTURES[architecture]
    precision, size = (weights, _OVERRIDES[weights]) if weights else _precision(config)
    return Model(
        name=name or str(config.get("_name_or_path") or architecture),
        family=family,
        layers=_positive(config, "num_hidden_layers"),
        hidden=_positive(config, "hidden_size"),
        vocabulary=_positive(config, "vocab_size"),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        weights=precision,
        weight_bytes=size,
        **shape(config),
    )


_SUFFIX = re.compile(
    r"(-(instruct|chat|base|hf|thinking|v0\.[23]|\d{4}|fp8|awq|gptq-int4|int4|w4a16))*",
    re.IGNORECASE,
)


def _suffix_precision(suffix: str) -> Precision | None:
    if "fp8" in suffix:
        return Precision.FP8
    return Precision.INT4 if re.search("awq|int4|w4a16", suffix) else None


def model_named(name: str, weights: Precision | None = None) -> Model:
    """A model whose shape is known without its config.json; the organisation may be left out."""
    wanted = name.lower().rsplit("/", 1)[-1].removeprefix("meta-")
    for key, config in KNOWN_CONFIGS.items():
        suffix = wanted.removeprefix(key.lower())
        if wanted.startswith(key.lower()) and _SUFFIX.fullmatch(suffix):
            return parse_config(config, name, weights or _suffix_precision(suffix))
    raise ModelError(
        f"model {name!r} is not known by name, give its config.json; "
        f"known are {', '.join(sorted(KNOWN_CONFIGS))}"
    )
