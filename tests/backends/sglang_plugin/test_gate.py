"""A step over some while the whole stays whole: who is chosen, how long, and what catches up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.sglang_plugin.control import Control
from backends.sglang_plugin.faults import Faults
from backends.sglang_plugin.gate import NONSENSE, Gate
from backends.sglang_plugin.riders import rider_of
from backends.sglang_plugin.view import MOST_LAG
from policies.step_line import SeenStep, StepLine
from policies.stepping import Valves
from tests.backends.sglang_plugin.fakes import Clock, FakeBatch, FakeRequest, prepare, request

LINE = StepLine(1_000.0, 1_000.0, 0.0)


def gate(clock: Clock | None = None, **control: Any) -> Gate:
    valves = Valves(
        most_parked_us=control.pop("most_parked_us", 1e9), hold_steps=control.pop("hold_steps", 4)
    )
    one = Gate(Faults("decode"), clock or Clock())
    one.adopt(replace(Control(line=LINE, valves=valves), **control))
    return one


def step(one: Gate, batch: FakeBatch) -> list[FakeRequest]:
    """As SGLang takes it: who took part, each with a token more."""
    one.begins(batch)
    one.prepare(prepare, batch)  # type: ignore[arg-type]
    ran = one.ends(batch)
    assert ran is not None
    for it in ran.reqs:
        it.output_ids.append(1)
    return list(ran.reqs)


def online(rid: str, **more: Any) -> FakeRequest:
    return request(rid, told={"slackwater_class": "online", "slackwater_tpot_ms": 3.9}, **more)


def offline(rid: str, **more: Any) -> FakeRequest:
    return request(rid, told={"slackwater_class": "offline"}, **more)


def mixed() -> FakeBatch:
    """Room for two at a step of at most 3.8 ms."""
    return FakeBatch([online("a"), offline("b"), online("c"), offline("d")])


def names(ran: list[FakeRequest]) -> str:
    return "".join(it.rid for it in ran)


def test_offline_requests_wait_where_the_step_would_be_too_long() -> None:
    one, batch = gate(mode="online-first"), mixed()
    assert names(step(one, batch)) == "ac"
    assert one.parked == 2


def test_the_whole_lags_behind_until_somebody_comes_and_catches_up_then() -> None:
    one, batch = gate(mode="online-first", hold_steps=16), mixed()
    for _ in range(3):
        step(one, batch)
    assert [it.seqlen for it in batch.reqs] == [104, 101, 104, 101]
    assert batch.seq_lens.values == [101] * 4
    batch.merge(offline("e"))
    step(one, batch)
    one.adopt(replace(one.control, mode="all"))
    step(one, batch)
    assert batch.seq_lens_cpu.values == [it.seqlen for it in batch.reqs]
    assert one.rests


@given(st.data())
def test_whatever_happens_between_steps_the_lengths_are_right(data: st.DataObject) -> None:
    one, batch = gate(mode="random", share=0.5, hold_steps=3), mixed()
    for number in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["step", "step", "come", "go", "all", "mixed"])):
            case "come":
                batch.merge(offline(f"n{number}"))
            case "go" if len(batch.reqs) > 1:
                batch.filter_batch(keep_indices=list(range(1, len(batch.reqs))))
            case "all":
                one.adopt(replace(one.control, mode="all"))
                step(one, batch)
                one.adopt(replace(one.control, mode="random"))
            case "mixed":
                one.prepare(prepare, batch)  # type: ignore[arg-type]
                for it in batch.reqs:
                    it.output_ids.append(1)
            case _:
                ran = step(one, batch)
                assert set(ran) <= set(batch.reqs)
                assert ran
    one.adopt(replace(one.control, mode="all"))
    step(one, batch)
    assert batch.seq_lens.values == [it.seqlen for it in batch.reqs]
    assert batch.orig_seq_lens.values == batch.seq_lens_cpu.values == batch.seq_lens.values


def test_one_choice_is_good_for_several_steps() -> None:
    one, batch = gate(mode="random", hold_steps=4), mixed()
    ran = [names(step(one, batch)) for _ in range(8)]
    assert len(set(ran[:4])) == 1
    assert len(set(ran[4:])) == 1
    assert one.views <= 2


def test_the_same_choice_again_goes_on_with_the_view_that_there_is() -> None:
    clock = Clock()
    one, batch = gate(clock, mode="online-first", hold_steps=4), mixed()
    for _ in range(12):
        assert names(step(one, batch)) == "ac"
        clock.us += 3_850
    assert (one.views, one.view_steps) == (1, 12)
    assert [rider_of(it, 0.0).skipped for it in batch.reqs] == [0, 8, 0, 8]
    assert batch.seq_lens.values == [101] * 4


def test_a_view_that_is_chosen_again_and_again_catches_up_at_times() -> None:
    clock = Clock()
    one, batch = gate(clock, mode="online-first", hold_steps=4), mixed()
    for _ in range(MOST_LAG + 1):
        step(one, batch)
        clock.us += 3_850
    assert one.views == 2
    assert batch.seq_lens.values == [101 + MOST_LAG, 101, 101 + MOST_LAG, 101]


def test_a_request_that_is_to_end_steps_at_once() -> None:
    one, batch = gate(mode="online-first", hold_steps=64), mixed()
    assert names(step(one, batch)) == "ac"
    batch.reqs[3].to_finish = object()
    assert "d" in names(step(one, batch))


def test_nobody_waits_longer_than_the_bound() -> None:
    clock = Clock()
    one, batch = gate(clock, mode="online-first", hold_steps=64, most_parked_us=50_000), mixed()
    waited: dict[str, float] = {}
    longest = 0.0
    for _ in range(100):
        ran = names(step(one, batch))
        for rid in "bd":
            waited[rid] = 0.0 if rid in ran else waited.get(rid, 0.0) + 5_000
            longest = max(longest, waited[rid])
        clock.us += 5_000
    assert 40_000 < longest <= 55_000


def test_somebody_always_steps() -> None:
    one, batch = gate(mode="random", share=0.0), mixed()
    assert all(len(step(one, batch)) == 1 for _ in range(10))


def test_penalised_requests_sit_out_no_step() -> None:
    one = gate(mode="random", share=0.0)
    batch = FakeBatch([online("a"), offline("p", params={"frequency_penalty": 0.5}), online("c")])
    assert all("p" in names(step(one, batch)) for _ in range(10))


def test_three_faults_and_everyone_steps_for_good() -> None:
    one, batch = gate(mode="faulty"), mixed()
    for _ in range(5):
        assert names(step(one, batch)) == "abcd"
    assert (one.faults.number, one.faults.over) == (3, True)
    assert batch.seq_lens.values == [it.seqlen for it in batch.reqs]


def test_without_a_lease_renewed_everyone_steps() -> None:
    clock = Clock()
    one, batch = gate(clock, mode="online-first", until_us=clock.us + 10_000), mixed()
    assert names(step(one, batch)) == "ac"
    clock.us += 20_000
    assert names(step(one, batch)) == "abcd"
    assert one.control == Control()


@pytest.mark.parametrize(
    ("where", "what", "value"),
    [
        ("batch", "beam_tail", object()),
        ("batch", "dllm_config", object()),
        ("batch", "input_ids", object()),
        ("sampling_info", "has_custom_logit_processor", True),
        ("sampling_info", "return_sampling_masks", [False, True, False, False]),
    ],
)
def test_everyone_steps_in_batches_of_a_kind_that_was_not_tested(
    where: str, what: str, value: object
) -> None:
    one, batch = gate(mode="online-first"), mixed()
    setattr(batch if where == "batch" else batch.sampling_info, what, value)
    assert names(step(one, batch)) == "abcd"
    assert not one.faults.over


def test_without_a_word_on_steps_it_waits_until_it_has_seen_some() -> None:
    one, batch = gate(mode="online-first", line=None), mixed()
    assert names(step(one, batch)) == "abcd"
    counts = [1 + i % 8 for i in range(64)]
    seen = [SeenStep(count, 0, 1_000.0 + 1_000.0 * count) for count in counts]
    one.belief.saw(seen, corrects=False)
    batch.merge(offline("e"))
    assert names(step(one, batch)) == "ac"


def test_a_step_is_as_long_as_the_size_that_its_graph_was_captured_for() -> None:
    for sizes, ran in (((), "ab"), ((1, 4, 8), "a")):
        one, batch = gate(mode="online-first"), FakeBatch([online("a"), offline("b")])
        one.sizes = sizes
        assert names(step(one, batch)) == ran


def test_nonsense_about_a_request_is_said_once_and_everything_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, batch = gate(mode="online-first"), mixed()
    for it in batch.reqs[1:]:
        it.sampling_params.custom_params = {"slackwater_class": "x", "slackwater_tpot_ms": "soon"}
    for number in range(3):
        assert names(step(one, batch))[:4] == "abcd"  # all count as online, and none has to wait
        batch.merge(online(f"e{number}"))
    assert [it.getMessage() for it in caplog.records] == [f"slackwater: decode: {NONSENSE}"]
    assert not one.faults.over
