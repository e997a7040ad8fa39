from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.devices import DEVICES, Precision, UnknownDevice, device_named
from policies.known_models import KNOWN_CONFIGS
from policies.models import ModelError, model_named, parse_config


def config(**changes: Any) -> dict[str, Any]:
    return {**KNOWN_CONFIGS["Llama-3.1-8B"], **changes}


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", 8.03, 7.50),
        ("meta-llama/Llama-3.1-70B", 70.55, 69.50),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62, 7.07),
        ("Qwen/Qwen3-32B", 32.76, 31.98),
        ("Qwen/Qwen3-30B-A3B", 30.53, 3.04),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.70, 12.75),
        ("deepseek-ai/DeepSeek-V3", 671.03, 36.62),
    ],
)
def test_parameters_add_up_to_what_the_publishers_count(
    name: str, billions: float, active: float
) -> None:
    model = model_named(name.removesuffix("-Instruct-v0.1"))
    assert model.params / 1e9 == pytest.approx(billions, abs=0.005)
    assert model.active_params / 1e9 == pytest.approx(active, abs=0.005)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [("Llama-3.1-8B", 131_072), ("Llama-3.1-70B", 327_680), ("DeepSeek-V3", 70_272)],
)
def test_cache_bytes_follow_from_grouped_heads_and_from_the_compressed_vector(
    name: str, per_token: int
) -> None:
    model = model_named(name)
    assert 2 * model.layers * model.attention.kv_values == per_token


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"]
)
def test_a_missing_field_is_named(field: str) -> None:
    broken = config()
    del broken[field]
    with pytest.raises(ModelError, match=field):
        parse_config(broken)


@pytest.mark.parametrize("value", [0, -3, "many", True, 2.5])
def test_a_field_that_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(ModelError, match="hidden_size"):
        parse_config(config(hidden_size=value))


@pytest.mark.parametrize("field", ["kv_lora_rank", "qk_rope_head_dim", "n_routed_experts"])
def test_a_deepseek_config_needs_its_own_fields(field: str) -> None:
    broken = {**KNOWN_CONFIGS["DeepSeek-V3"]}
    del broken[field]
    with pytest.raises(ModelError, match=field):
        parse_config(broken)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        parse_config(config(architectures=["MambaForCausalLM"]))
    with pytest.raises(ModelError, match="architectures"):
        parse_config(config(architectures=[]))


def test_a_model_that_only_begins_like_a_known_one_is_not_taken_for_it() -> None:
    for name in ("DeepSeek-R1-Distill-Llama-70B", "Qwen3-8B-VL", "Llama-3.1", "Qwen3-80B"):
        with pytest.raises(ModelError, match=r"config\.json"):
            model_named(name)


@pytest.mark.parametrize(
    ("quantization", "precision", "size"),
    [
        (None, Precision.BF16, 2.0),
        ({"quant_method": "fp8"}, Precision.FP8, 1.0),
        ({"quant_method": "awq", "bits": 4}, Precision.INT4, 0.52),
        ({"quant_method": "gptq", "bits": 8}, Precision.INT8, 1.0),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            Precision.FP8,
            1.0,
        ),
    ],
)
def test_quantization_decides_the_bytes_of_a_weight(
    quantization: object, precision: Precision, size: float
) -> None:
    model = parse_config(config(quantization_config=quantization))
    assert model.weights is precision
    assert model.weight_bytes == pytest.approx(size, abs=0.001)


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "bitnet"}, {"quant_method": "gptq", "bits": 3}, {"quant_method": "awq"}],
)
def test_unknown_quantization_is_refused(quantization: object) -> None:
    with pytest.raises(ModelError, match="quantization"):
        parse_config(config(quantization_config=quantization))


def test_a_name_may_say_how_weights_are_stored() -> None:
    assert model_named("Qwen/Qwen3-8B-FP8").weights is Precision.FP8
    assert model_named("Qwen/Qwen2.5-7B-Instruct-AWQ").weights is Precision.INT4


def test_heads_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ModelError, match="32 attention heads"):
        parse_config(config(num_key_value_heads=7))


def test_dense_layers_of_a_mixture_are_counted_apart() -> None:
    mixed = {**KNOWN_CONFIGS["Qwen3-30B-A3B"], "mlp_only_layers": [0, 1]}
    assert parse_config(mixed).dense_layers == 2
    assert model_named("DeepSeek-V3").expert_layers == 58


@given(st.sampled_from(sorted(KNOWN_CONFIGS)))
def test_no_token_passes_through_more_than_there_is(name: str) -> None:
    model = model_named(name)
    assert 0 < model.active_params <= model.params + model.head_params


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("H100", "h100"),
        ("h100_sxm", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("Ascend910B3", "ascend-910b"),
    ],
)
def test_a_device_answers_to_the_names_it_reports(said: str, name: str) -> None:
    assert device_named(said).name == name


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(UnknownDevice, match=r"mi300.*h100"):
        device_named("mi300")


def test_every_device_says_where_its_numbers_come_from() -> None:
    assert all(device.source for device in DEVICES.values())
    assert [device.name for device in DEVICES.values() if device.nominal] == ["cpu"]
