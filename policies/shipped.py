"""The constants that come with the package, and for each where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from policies.constants import ANY, Constants, Key
from policies.fitted_constants import FITTED

TYPICAL = Constants(
    gemm_efficiency=0.8,
    large_step_slowdown=0.05,
    attention_efficiency=0.6,
    weight_efficiency=0.8,
    kv_efficiency=0.9,
    few_sequences_penalty=0.1,
    exposed=0.2,
    activation_factor=1.0,
    link_efficiency=0.4,
    all_reduce_us=8.0,
    large_all_reduce_us=20.0,
    prefill_layer_us=50.0,
    decode_layer_us=30.0,
    sequence_layer_us=0.1,
    source="round figures for a data-centre GPU, where every fit begins",
)

_H100 = FITTED.get(("h100", ANY, 0), TYPICAL)
_A100 = FITTED.get(("a100", ANY, 0), TYPICAL)

ASSUMED: Mapping[Key, Constants] = MappingProxyType(
    {
        ("b200", ANY, 0): replace(
            _H100,
            source="assumed as on H100: no step times of a B200 were at hand",
        ),
        ("l40s", ANY, 0): replace(
            _A100,
            gemm_efficiency=round(_A100.gemm_efficiency * 0.32 / 0.38, 4),
            source="assumed: A100's, products scaled by the ratio of inference-sim's prefill MFU "
            "(0.32 to 0.38); no step times of an L40S were at hand",
        ),
        ("ascend-910b", ANY, 0): Constants(
            gemm_efficiency=0.68,
            large_step_slowdown=0.001,
            attention_efficiency=0.59,
            weight_efficiency=0.58,
            kv_efficiency=0.38,
            few_sequences_penalty=0.001,
            exposed=0.01,
            activation_factor=1.0,
            link_efficiency=1.0,
            all_reduce_us=8.0,
            large_all_reduce_us=20.0,
            prefill_layer_us=643.0,
            decode_layer_us=0.1,
            sequence_layer_us=0.0001,
            source="xLLM's scheduler constants (perf_model.cpp); its 18 ms per prefill spread "
            "over the 28 layers of Qwen2.5-7B; activations and all-reduce latency assumed",
        ),
        ("cpu", ANY, 0): Constants(
            gemm_efficiency=0.1,
            large_step_slowdown=0.001,
            attention_efficiency=0.04,
            weight_efficiency=0.1,
            kv_efficiency=0.05,
            few_sequences_penalty=0.001,
            exposed=0.5,
            activation_factor=2.0,
            link_efficiency=0.5,
            all_reduce_us=50.0,
            large_all_reduce_us=50.0,
            prefill_layer_us=500.0,
            decode_layer_us=300.0,
            sequence_layer_us=10.0,
            source="round figures for no machine in particular: calibrate before use",
        ),
    }
)

SHIPPED: Mapping[Key, Constants] = MappingProxyType({**ASSUMED, **FITTED})
"""Fitted where step times exist, assumed elsewhere; `source` says which."""
