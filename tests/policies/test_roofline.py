from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.constants import (
    ANY,
    NUMBERS,
    PEAK,
    Constants,
    ConstantsError,
    check,
    lookup,
)
from policies.devices import DEVICES, Precision, device_named
from policies.models import model_named
from policies.roofline import (
    Bottleneck,
    CostModel,
    Parallel,
    Phase,
    build,
    decode_batch,
    prefill_batch,
)
from policies.shipped import SHIPPED

MODELS = ["Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-30B-A3B", "DeepSeek-V3", "Qwen2.5-14B"]
DEVICE_NAMES = sorted(DEVICES)


def cost_of(
    model: str = "Llama-3.1-8B",
    device: str = "h100",
    tp: int = 1,
    *,
    constants: Constants | None = None,
) -> CostModel:
    shape = model_named(model)
    chosen = constants or lookup(SHIPPED, device, shape.family, tp)
    return build(shape, device_named(device), chosen, Parallel(tp=tp))


costs = st.builds(
    cost_of,
    st.sampled_from(MODELS),
    st.sampled_from(DEVICE_NAMES),
    st.sampled_from([1, 2, 4, 8]),
)
prompts = st.lists(
    st.tuples(st.integers(1, 20_000), st.integers(0, 50_000)), min_size=1, max_size=6
)


def test_peaks_alone_give_the_textbook_times() -> None:
    cost = cost_of(constants=PEAK)
    weights_s = 2 * model_named("Llama-3.1-8B").active_params / 3.35e12
    assert cost.decode(1, 1000).weights_s == pytest.approx(weights_s)
    assert cost.decode(1, 1000).kv_read_s == pytest.approx(1000 * 131_072 / 3.35e12)
    layers = model_named("Llama-3.1-8B").linear_params
    head = model_named("Llama-3.1-8B").head_params
    assert cost.prefill_one(4096).gemm_s == pytest.approx((4096 * layers + head) * 2 / 989e12)
    pairs = 4096 * 4097 / 2
    assert cost.prefill_one(4096).attention_s == pytest.approx(4 * 4096 * 32 * pairs / 989e12)


@given(costs, prompts)
def test_the_seconds_are_the_sum_of_the_terms(
    cost: CostModel, batch: list[tuple[int, int]]
) -> None:
    step = cost.prefill(batch)
    terms = [getattr(step, field.name) for field in fields(step)]
    assert all(term >= 0 for term in terms)
    assert step.seconds == pytest.approx(sum(terms))
    assert sum(step.by_resource().values()) == pytest.approx(step.seconds)


@given(costs, prompts, st.tuples(st.integers(1, 5000), st.integers(0, 5000)))
def test_one_more_prompt_is_never_cheaper(
    cost: CostModel, batch: list[tuple[int, int]], more: tuple[int, int]
) -> None:
    assert cost.prefill([*batch, more]).seconds >= cost.prefill(batch).seconds


@given(costs, st.integers(1, 20_000), st.integers(0, 20_000), st.integers(1, 5000))
def test_a_longer_cached_prefix_costs_more_but_less_than_computing_it(
    cost: CostModel, new: int, cached: int, more: int
) -> None:
    there = cost.prefill_one(new, cached + more).seconds
    assert there >= cost.prefill_one(new, cached).seconds
    assert there <= cost.prefill_one(new + cached + more).seconds


@given(costs, st.integers(1, 600), st.integers(0, 1_000_000), st.integers(1, 100_000))
def test_longer_contexts_never_decode_faster(
    cost: CostModel, count: int, context: int, more: int
) -> None:
    assert cost.decode(count, context + more).seconds >= cost.decode(count, context).seconds


@given(costs, st.integers(1, 600), st.integers(1, 32_768))
def test_another_sequence_of_the_same_length_never_decodes_faster(
    cost: CostModel, count: int, length: int
) -> None:
    larger = cost.decode(count + 1, (count + 1) * length).seconds
    assert larger >= cost.decode(count, count * length).seconds


@given(costs, st.lists(st.integers(1, 32_768), min_size=1, max_size=40))
def test_a_list_of_contexts_costs_what_its_sums_cost(cost: CostModel, contexts: list[int]) -> None:
    step = cost.decode_contexts(contexts)
    assert step == cost.decode(len(contexts), sum(contexts))
    assert step == cost.cost(decode_batch(len(contexts), sum(contexts)))


@given(costs, st.integers(1, 32_768), st.integers(0, 32_768))
def test_one_prompt_costs_what_a_batch_of_it_costs(cost: CostModel, new: int, cached: int) -> None:
    assert cost.prefill_one(new, cached) == cost.prefill([(new, cached)])
    assert cost.prefill_one(new, cached) == cost.cost(prefill_batch([(new, cached)]))


def test_chunks_of_a_prompt_share_its_attention_out() -> None:
    whole = prefill_batch([(8192, 0)])
    chunks = [prefill_batch([(2048, start)]) for start in range(0, 8192, 2048)]
    assert sum(chunk.pairs for chunk in chunks) == whole.pairs
    assert sum(chunk.new_tokens for chunk in chunks) == whole.new_tokens


def test_the_bottleneck_follows_from_the_terms() -> None:
    cost = cost_of()
    assert cost.prefill_one(8192).bottleneck is Bottleneck.COMPUTE
    assert cost.decode(8, 8000).bottleneck is Bottleneck.BANDWIDTH
    slow = replace(lookup(SHIPPED, "h100", ANY, 0), decode_layer_us=5000.0)
    assert cost_of(constants=slow).decode(8, 8000).bottleneck is Bottleneck.OVERHEAD
    narrow = cost_of("Llama-3.1-70B", "ascend-910b", 8)
    assert narrow.prefill_one(8192).bottleneck is Bottleneck.LINK


def test_a_short_chunk_on_a_long_prefix_waits_for_the_cache() -> None:
    step = cost_of().prefill_one(8, 100_000)
    assert step.kv_read_s > 0
    assert step.attention_s == 0


@pytest.mark.parametrize(
    ("count", "milliseconds"), [(1, 15.4), (32, 21.5), (128, 40.2), (256, 65.1)]
)
def test_the_ascend_constants_give_the_decode_times_of_the_scheduler_they_are_from(
    count: int, milliseconds: float
) -> None:
    step = cost_of("Qwen2.5-7B", "ascend-910b").decode(count, count * 2000)
    assert step.seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize(("tokens", "milliseconds"), [(1024, 71), (2048, 127), (4096, 250)])
def test_the_ascend_constants_give_the_prefill_times_of_the_scheduler_they_are_from(
    tokens: int, milliseconds: float
) -> None:
    step = cost_of("Qwen2.5-7B", "ascend-910b").prefill_one(tokens)
    assert step.seconds * 1e3 == pytest.approx(milliseconds, rel=0.04)


@pytest.mark.parametrize(
    ("model", "device", "tp", "phase", "count", "length", "milliseconds"),
    [
        ("Llama-3.1-70B", "h100", 4, Phase.PREFILL, 1, 1024, 68.7),
        ("Llama-3.1-70B", "h200", 4, Phase.PREFILL, 1, 4096, 270.0),
        ("Llama-3.1-70B", "a100", 4, Phase.PREFILL, 1, 1024, 193.0),
        ("Llama-3.1-70B", "h100", 4, Phase.DECODE, 128, 2048, 26.4),
        ("Llama-3.1-70B", "h100", 4, Phase.DECODE, 256, 4096, 51.9),
        ("Llama-3.1-8B", "h100", 1, Phase.DECODE, 32, 2048, 9.5),
    ],
)
def test_shipped_constants_are_near_published_step_times(
    model: str, device: str, tp: int, phase: Phase, count: int, length: int, milliseconds: float
) -> None:
    cost = cost_of(model, device, tp)
    batch = (
        decode_batch(count, count * length)
        if phase is Phase.DECODE
        else prefill_batch([(length, 0)] * count)
    )
    assert cost.cost(batch).seconds * 1e3 == pytest.approx(milliseconds, rel=0.08)


def test_few_tokens_wake_few_experts() -> None:
    mixture = cost_of("Qwen3-30B-A3B")
    one, many = mixture.weight_read_s(1), mixture.weight_read_s(2000)
    shape = model_named("Qwen3-30B-A3B")
    assert one / many == pytest.approx(
        shape.active_params / (shape.params - shape.head_params), rel=0.05
    )
    assert mixture.weight_read_s(64) < many


def test_tensor_parallelism_shards_weights_but_not_a_compressed_cache() -> None:
    one, eight = cost_of("DeepSeek-V3", "b200", 1), cost_of("DeepSeek-V3", "b200", 8)
    assert eight.weight_bytes_per_device == pytest.approx(one.weight_bytes_per_device / 8)
    assert eight.kv_device_bytes_per_token == one.kv_device_bytes_per_token
    assert cost_of(tp=8).kv_device_bytes_per_token * 8 == cost_of().kv_device_bytes_per_token


def test_a_device_holds_at_least_one_head() -> None:
    kv_bytes = cost_of("Qwen3-30B-A3B", tp=8).kv_device_bytes_per_token
    assert kv_bytes == pytest.approx(48 * 2 * 128 * 2)


def test_attention_by_replica_leaves_each_device_its_own_cache_and_merges_the_rest() -> None:
    model, device = model_named("DeepSeek-V3"), device_named("h200")
    constants = lookup(SHIPPED, "h200", ANY, 0)
    spread = Parallel(tp=8, dp=8, dp_attention=True)
    merged = build(model, device, constants, spread)
    alone = build(model, device, constants, Parallel(tp=8))
    assert spread.devices == 8
    assert merged.token_all_reduce_s == pytest.approx(8 * alone.token_all_reduce_s)
    assert merged.weight_bytes_per_device > alone.weight_bytes_per_device
    assert merged.pair_s == pytest.approx(8 * alone.pair_s)


@pytest.mark.parametrize(("tp", "dp", "merged"), [(0, 1, False), (1, 0, False), (4, 3, True)])
def test_impossible_spreads_are_refused(tp: int, dp: int, merged: bool) -> None:  # noqa: FBT001
    with pytest.raises(ValueError, match="dp"):
        Parallel(tp=tp, dp=dp, dp_attention=merged)


def test_heads_that_a_spread_would_cut_are_refused() -> None:
    constants = lookup(SHIPPED, "h100", ANY, 0)
    with pytest.raises(ValueError, match="32 heads cannot be shared by tp 3"):
        build(model_named("Llama-3.1-8B"), device_named("h100"), constants, Parallel(tp=3))


def test_a_cache_in_fp8_is_half_as_large() -> None:
    model, device = model_named("Llama-3.1-8B"), device_named("h100")
    constants = lookup(SHIPPED, "h100", "llama", 1)
    half = build(model, device, constants, kv_cache=Precision.FP8)
    assert half.kv_bytes_per_token * 2 == cost_of().kv_bytes_per_token
    with pytest.raises(ValueError, match="int4"):
        build(model, device, constants, kv_cache=Precision.INT4)


def test_fp8_weights_halve_reads_and_double_the_rate_where_the_device_can() -> None:
    bf16 = cost_of(constants=PEAK)
    fp8 = cost_of("Llama-3.1-8B-FP8", constants=PEAK)
    assert fp8.token_gemm_s * 2 == pytest.approx(bf16.token_gemm_s)
    assert fp8.fixed_weights_s < bf16.fixed_weights_s * 0.6
    old = cost_of("Llama-3.1-8B-FP8", "a100", constants=PEAK)
    assert old.token_gemm_s == cost_of(device="a100", constants=PEAK).token_gemm_s


def test_the_most_specific_constants_win_and_no_device_borrows() -> None:
    assert lookup(SHIPPED, "h100", "llama", 4) is SHIPPED["h100", "llama", 4]
    assert lookup(SHIPPED, "h100", "mistral", 2) is SHIPPED["h100", ANY, 0]
    with pytest.raises(ConstantsError, match=r"mi300.*calibrate"):
        lookup(SHIPPED, "mi300", "llama", 1)


@pytest.mark.parametrize("key", sorted(SHIPPED))
def test_shipped_constants_are_possible_and_say_where_they_come_from(
    key: tuple[str, str, int],
) -> None:
    assert check(SHIPPED[key]).source.startswith(("fitted", "assumed", "xLLM", "round"))
    assert key[0] in DEVICES


@pytest.mark.parametrize("name", NUMBERS)
def test_negative_constants_are_refused_by_name(name: str) -> None:
    good = SHIPPED["h100", ANY, 0]
    with pytest.raises(ConstantsError, match=name):
        check(Constants(**{**asdict(good), name: -1.0}))


@pytest.mark.real_time
def test_a_prediction_costs_less_than_five_microseconds() -> None:
    cost = cost_of("Llama-3.1-70B", "h100", 4)
    calls = 500

    def microseconds(predict: Callable[[], object]) -> float:
        runs = timeit.repeat(predict, number=calls, repeat=100, timer=time.thread_time)
        return min(runs) / calls * 1e6

    assert microseconds(lambda: cost.decode(33, 66_000).seconds) < 5
    assert microseconds(lambda: cost.prefill_one(900, 50).seconds) < 5
