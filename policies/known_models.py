"""The published config.json fields of models that are asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _dense(
    architecture: str,
    shape: tuple[int, int, int, int, int],
    vocabulary: int,
    *,
    head: int = 128,
    tied: bool = False,
) -> dict[str, Any]:
    layers, hidden, width, heads, kv_heads = shape
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def _qwen_moe(shape: tuple[int, int, int, int, int], width: int) -> dict[str, Any]:
    return {
        **_dense("Qwen3Moe", shape, 151936),
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}

KNOWN_CONFIGS: dict[str, Mapping[str, Any]] = {
    "Llama-2-7b": _dense("Llama", (32, 4096, 11008, 32, 32), 32000),
    "Llama-2-13b": _dense("Llama", (40, 5120, 13824, 40, 40), 32000),
    "Llama-2-70b": _dense("Llama", (80, 8192, 28672, 64, 8), 32000),
    "Llama-3.1-8B": _dense("Llama", (32, 4096, 14336, 32, 8), 128256),
    "Llama-3.1-70B": _dense("Llama", (80, 8192, 28672, 64, 8), 128256),
    "Llama-3.1-405B": _dense("Llama", (126, 16384, 53248, 128, 8), 128256),
    "Llama-3.2-1B": _dense("Llama", (16, 2048, 8192, 32, 8), 128256, head=64, tied=True),
    "Llama-3.2-3B": _dense("Llama", (28, 3072, 8192, 24, 8), 128256, tied=True),
    "Llama-3.3-70B": _dense("Llama", (80, 8192, 28672, 64, 8), 128256),
    "Mistral-7B": _dense("Mistral", (32, 4096, 14336, 32, 8), 32768),
    "Mixtral-8x7B": {
        **_dense("Mixtral", (32, 4096, 14336, 32, 8), 32000),
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen2.5-0.5B": _dense("Qwen2", (24, 896, 4864, 14, 2), 151936, head=64, tied=True),
    "Qwen2.5-7B": _dense("Qwen2", (28, 3584, 18944, 28, 4), 152064),
    "Qwen2.5-14B": _dense("Qwen2", (48, 5120, 13824, 40, 8), 152064),
    "Qwen2.5-32B": _dense("Qwen2", (64, 5120, 27648, 40, 8), 152064),
    "Qwen2.5-72B": _dense("Qwen2", (80, 8192, 29568, 64, 8), 152064),
    "Qwen3-0.6B": _dense("Qwen3", (28, 1024, 3072, 16, 8), 151936, tied=True),
    "Qwen3-1.7B": _dense("Qwen3", (28, 2048, 6144, 16, 8), 151936, tied=True),
    "Qwen3-4B": _dense("Qwen3", (36, 2560, 9728, 32, 8), 151936, tied=True),
    "Qwen3-8B": _dense("Qwen3", (36, 4096, 12288, 32, 8), 151936),
    "Qwen3-14B": _dense("Qwen3", (40, 5120, 17408, 40, 8), 151936),
    "Qwen3-32B": _dense("Qwen3", (64, 5120, 25600, 64, 8), 151936),
    "Qwen3-30B-A3B": _qwen_moe((48, 2048, 6144, 32, 4), 768),
    "Qwen3-235B-A22B": _qwen_moe((94, 4096, 12288, 64, 4), 1536),
    "DeepSeek-V3": _DEEPSEEK_V3,
    "DeepSeek-R1": _DEEPSEEK_V3,
}
