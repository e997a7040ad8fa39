from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.breaker import Breaker, BreakerRule
from policies.calibration import DecodeMoments
from policies.constants import lookup
from policies.correction import Correction
from policies.devices import device_named
from policies.events import Load
from policies.ledger import Ledger
from policies.models import model_named
from policies.place import LeastWork
from policies.roofline import CostModel, Parallel, build
from policies.shipped import SHIPPED
from policies.steps import Costs, Counters, Steps
from policies.types import Job, Kind, Role, Worker


def cost_of(model: str, device: str = "h100", tp: int = 1) -> CostModel:
    shape, kind = model_named(model), device_named(device)
    return build(shape, kind, lookup(SHIPPED, kind.name, shape.family, tp), Parallel(tp=tp))


DENSE = cost_of("Llama-3.1-8B")
COMPRESSED = cost_of("DeepSeek-V3", tp=8)


def counters(
    tokens: int = 0, busy_us: int = 0, steps: int = 0, batch: int = 1, step_us: float = 0.0
) -> Counters:
    return Counters(
        prefill_tokens=tokens,
        prefill_busy_us=busy_us,
        decoded=DecodeMoments(
            steps=steps,
            batch=steps * batch,
            time_us=steps * step_us,
            batch_squared=steps * batch * batch,
            batch_time_us=steps * batch * step_us,
            generated=steps * batch,
        ),
    )


def ledger(cost: CostModel | None, *, name: str = "d", decodes: int = 0) -> Ledger:
    found = Ledger(Worker(name=name, url="http://d", role=Role.DECODE), Breaker(BreakerRule()))
    found.predict_by(cost)
    for _ in range(decodes):
        found.add_decode(1000, 1000)
    return found


def job(prompt: int = 1000) -> Job:
    return Job("j", Kind.ONLINE, "m", prompt, 100, 0, 10**6, 10**7)


def load(found: Counters, seen_us: int = 1) -> Load:
    return Load(
        seen_us=seen_us, running=0, waiting=0, used_tokens=0, total_tokens=0, counters=found
    )


@pytest.mark.parametrize("cost", [DENSE, COMPRESSED], ids=["dense", "compressed cache"])
@given(count=st.integers(1, 600), mean=st.integers(1, 20_000))
def test_the_tables_say_what_the_cost_model_says(cost: CostModel, count: int, mean: int) -> None:
    predicted_us = Steps(cost).decode_us(count, count * mean)
    assert predicted_us == pytest.approx(cost.decode(count, count * mean).seconds * 1e6, rel=1e-9)


def test_ranks_behind_one_door_share_the_sequences() -> None:
    one, four = Steps(DENSE), Steps(DENSE, replicas=4)
    assert four.decode_us(64, 64_000) == pytest.approx(one.decode_us(16, 16_000))
    assert four.prefill_tokens_per_us == pytest.approx(4 * one.prefill_tokens_per_us)


def test_a_decode_server_is_ranked_by_its_own_model_and_its_correction() -> None:
    small, large = ledger(cost_of("Llama-3.1-8B")), ledger(cost_of("Llama-3.1-70B", tp=8))
    place = LeastWork()
    first, second = place.decode(job(), [small, large])
    assert first < second
    assert small.steps is not None
    before = place.decode(job(), [small])[0]
    for turn in range(4):
        small.add_decode(1000, 1000)
        small.correct(load(counters(steps=20 * turn, batch=1, step_us=30_000.0)))
        small.end_decode(1000, 1000)
    assert place.decode(job(), [small])[0] > 3 * before


def test_without_hardware_more_work_is_a_longer_step_still() -> None:
    idle, loaded = ledger(None), ledger(None, decodes=8)
    first, second = LeastWork().decode(job(), [idle, loaded])
    assert first < second


def test_the_prefill_rate_is_the_predicted_one_until_one_was_seen() -> None:
    found = ledger(DENSE)
    assert found.steps is not None
    assert found.prefill_tokens_per_us == found.steps.prefill_tokens_per_us
    found.add_prefill(4000, 0)
    found.prefilled(4000, 1_000_000)
    assert found.prefill_tokens_per_us == pytest.approx(0.004)
    assert ledger(None).prefill_tokens_per_us is None


def test_sequences_that_come_and_go_between_two_reports_are_in_the_mean_context() -> None:
    steps = Steps(DENSE)
    true_us = DENSE.decode(16, 16 * 8000).seconds * 1e6
    for turn in range(4):
        for _ in range(16):
            steps.left(8000)
        seen = counters(steps=10 * turn, batch=16, step_us=true_us)
        steps.observe(seen, 0, 0, turn)
    assert steps.decode.steps == 30
    assert steps.decode.factor == pytest.approx(1.0, rel=1e-6)


def test_steps_of_unknown_contexts_and_reports_without_steps_say_nothing() -> None:
    steps = Steps(DENSE)
    steps.observe(counters(), 0, 0, 1)
    steps.observe(counters(steps=50, batch=4, step_us=1e5), 0, 0, 2)
    steps.observe(counters(steps=50, batch=4, step_us=1e5), 4, 4000, 3)
    assert steps.decode.steps == 0


def test_prefill_is_corrected_by_its_time_per_token_also_in_chunks() -> None:
    steps = Steps(DENSE, chunk_tokens=2048)
    chunks_s = sum(DENSE.prefill_one(2048, cached).seconds for cached in (0, 2048, 4096))
    for turn in range(1, 5):
        steps.observe(counters(6144 * turn, round(2e6 * chunks_s) * turn), 0, 0, turn)
        for _ in range(1):
            steps.prefilled(6144)
    steps.observe(counters(6144 * 5, round(2e6 * chunks_s) * 5), 0, 0, 5)
    assert steps.prefill.factor == pytest.approx(2.0, rel=0.02)


def test_a_prompt_that_ends_before_its_tokens_are_counted_waits_for_them() -> None:
    steps = Steps(DENSE)
    steps.observe(counters(), 0, 0, 1)
    steps.prefilled(2048)
    steps.observe(counters(), 0, 0, 2)
    assert steps.prefill.steps == 0
    steps.observe(counters(2048, 40_000), 0, 0, 3)
    assert steps.prefill.steps == 1


def test_what_was_learnt_stays_for_as_long_as_the_hardware_does() -> None:
    found = ledger(DENSE)
    steps = found.steps
    found.predict_by(DENSE)
    assert found.steps is steps
    found.predict_by(COMPRESSED)
    assert found.steps is not steps
    found.predict_by(None)
    assert found.steps is None


def test_a_worker_has_its_own_model_or_the_one_of_all() -> None:
    costs = Costs(default=DENSE, by_name={"b": COMPRESSED})
    worker = Worker(name="a", url="http://a", role=Role.DECODE)
    assert costs.of(worker) is DENSE
    assert costs.of(Worker(name="b", url="http://b", role=Role.DECODE)) is COMPRESSED


def test_while_no_steps_were_counted_decoding_is_as_slow_as_prefilling_turned_out_to_be() -> None:
    """A unified server with a prompt before each step counts none."""
    cost = cost_of("Llama-3.1-8B")
    steps = Steps(cost, chunk_tokens=8192)
    before_us = steps.decode_us(20, 20_000)
    for number in range(12):
        steps.prefilled(8192)
        done, took_s = number * 8192, number * cost.prefill_one(8192).seconds * 3
        seen = Counters(prefill_tokens=done, prefill_busy_us=round(took_s * 1e6))
        steps.observe(seen, 20, 20_000, number)
    assert steps.decode_us(20, 20_000) == pytest.approx(before_us * steps.prefill.factor)
    assert steps.prefill.factor > 1


def test_once_steps_are_counted_they_speak_for_themselves() -> None:
    steps = Steps(cost_of("Llama-3.1-8B"))
    steps.prefill = Correction(factor=4.0)
    assert steps.decode_factor == 4.0
    steps.decode = Correction(factor=2.0, ratios=(0.7,) * 8)
    assert steps.decode_factor == 2.0
    steps.decode = Correction(factor=2.0, ratios=(0.7,) * 7)
    assert steps.decode_factor == 4.0
