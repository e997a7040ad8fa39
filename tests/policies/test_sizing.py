from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.constants import lookup
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import Bottleneck, CostModel, DoesNotFit, Parallel, build
from policies.shipped import SHIPPED
from policies.sizing import (
    LARGEST_BATCH,
    capacity_tokens,
    greatest,
    largest_batch,
    linear_saturation_batch,
    preferred_length,
    saturation_batch,
    transfer,
)


def cost_of(model: str, device: str, tp: int = 1) -> CostModel:
    shape = model_named(model)
    constants = lookup(SHIPPED, device, shape.family, tp)
    return build(shape, device_named(device), constants, Parallel(tp=tp))


LLAMA = cost_of("Llama-3.1-70B", "h100", 4)


@given(st.integers(-5, 50), st.integers(1, 10), st.integers(10, 40))
def test_the_greatest_that_fits_is_found(limit: int, low: int, high: int) -> None:
    found = greatest(lambda n: n <= limit, low, high)
    assert found == max(low - 1, min(limit, high))


def test_capacity_is_what_the_weights_leave() -> None:
    tokens = capacity_tokens(LLAMA)
    used = LLAMA.weight_bytes_per_device + tokens * LLAMA.kv_device_bytes_per_token
    assert used == pytest.approx(0.85 * LLAMA.memory_bytes_per_device, rel=1e-5)
    assert capacity_tokens(LLAMA, 0.9) > tokens


def test_a_model_that_does_not_fit_is_refused_with_its_size() -> None:
    with pytest.raises(DoesNotFit, match=r"131\.4 GiB.*raise tp"):
        capacity_tokens(cost_of("Llama-3.1-70B", "h100"))


def test_a_transfer_takes_the_wire_and_its_latency() -> None:
    moved = transfer(LLAMA, 1000, bytes_per_s=1e9, latency_s=0.002)
    assert moved.kv_bytes == 327_680_000
    assert moved.seconds == pytest.approx(0.32968)
    assert transfer(LLAMA, 1000).wire_s == pytest.approx(0.32768 / 200)
    with pytest.raises(ValueError, match="moves nothing"):
        transfer(LLAMA, 1, bytes_per_s=0)


@pytest.mark.parametrize(
    ("device", "gemm", "memory", "batch"),
    [
        ("ascend-910b", 0.68, 0.58, 340),
        ("h200", 1.0, 1.0, 233),
        ("h200", 0.68, 0.58, 280),
        ("h100", 1.0, 1.0, 354),
        ("h100", 0.68, 0.58, 429),
    ],
)
def test_the_printed_saturation_batch_of_ooco(
    device: str, gemm: float, memory: float, batch: int
) -> None:
    found = linear_saturation_batch(
        model_named("Qwen2.5-7B"),
        device_named(device),
        gemm_efficiency=gemm,
        memory_efficiency=memory,
    )
    assert found == batch


def test_an_operator_that_never_saturates_gives_the_largest_batch() -> None:
    device = replace(device_named("h100"), memory_bytes_per_s=1e9)
    assert linear_saturation_batch(model_named("Qwen2.5-0.5B"), device) == LARGEST_BATCH


@pytest.mark.parametrize("cost", [LLAMA, cost_of("Qwen3-30B-A3B", "h100")])
def test_at_saturation_arithmetic_has_caught_up_with_the_weights(cost: CostModel) -> None:
    batch = saturation_batch(cost)
    assert batch * cost.token_gemm_s >= cost.weight_read_s(batch)
    assert (batch - 1) * cost.token_gemm_s < cost.weight_read_s(batch - 1)


@given(st.integers(1, 32_768), st.floats(0.001, 0.2), st.integers(1, 2_000_000))
def test_the_largest_batch_meets_its_target_and_one_more_breaks_it(
    context: int, step_s: float, kv_tokens: int
) -> None:
    limit = largest_batch(LLAMA, context, step_s, kv_tokens)
    if limit.count:
        assert LLAMA.decode(limit.count, limit.count * context).seconds <= step_s
    more = limit.count + 1
    late = LLAMA.decode(more, more * context).seconds > step_s
    assert late or more * context > kv_tokens


def test_the_limit_says_what_would_break() -> None:
    assert largest_batch(LLAMA, 2000, 1.0, 100_000).limited_by is Bottleneck.CAPACITY
    assert largest_batch(LLAMA, 2000, 0.03, 10**9).limited_by is Bottleneck.BANDWIDTH
    assert largest_batch(LLAMA, 2000, 0.001, 10**9).count == 0


@pytest.mark.parametrize(("step_s", "length"), [(0.035, 388), (0.040, 565), (0.050, 918)])
def test_the_preferred_length_agrees_with_the_published_scheduler(
    step_s: float, length: int
) -> None:
    cost = cost_of("Qwen2.5-7B", "ascend-910b")
    found = preferred_length(cost, 40, 60_000, saturation=340, step_s=step_s, free_tokens=10**7)
    assert found == pytest.approx(length, rel=0.2)


@given(
    st.integers(0, 400), st.integers(0, 800_000), st.floats(0.001, 0.2), st.integers(0, 1_000_000)
)
def test_newcomers_of_the_preferred_length_keep_target_and_memory(
    count: int, context: int, step_s: float, free: int
) -> None:
    found = preferred_length(LLAMA, count, context, saturation=344, step_s=step_s, free_tokens=free)
    seats = max(344 - count, 1)
    assert 0 <= found * seats <= free
    if found:
        assert LLAMA.decode(count + seats, context + seats * found).seconds <= step_s
