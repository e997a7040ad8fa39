"""What is told of each step, when, and to whom; and how the gateway reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.engine_words import setting, states_of, steps_of, told
from backends.sglang_plugin.faults import Faults
from backends.sglang_plugin.plugin import Options, Plugin
from backends.sglang_plugin.reports import EVERY_US, LOOK_EVERY, Reporter, Step
from backends.sglang_plugin.targets import Feature
from policies.step_line import SeenStep
from policies.types import Job, Kind
from tests.backends.sglang_plugin.fakes import Clock, DecodeMode, FakeBatch, request


class Listener:
    """A socket with somebody at its end, or nobody."""

    def __init__(self, *, heard: bool = True) -> None:
        self.heard = heard
        self.sent: list[bytes] = []
        self.endpoint = "tcp://127.0.0.1:1"

    def is_heard(self) -> bool:
        return self.heard

    def send(self, number: int, steps: list[Step]) -> None:
        self.sent.append(json.dumps({"steps": steps}).encode())


def reporter(
    clock: Clock, listener: Any, seen: list[Step] | None = None, *, chooses: bool = False
) -> Reporter:
    """It has looked who listens."""
    one = Reporter(
        Faults("reports"),
        clock,
        (seen if seen is not None else []).extend,
        lambda: chooses,
        lambda: 1,
        lambda: listener,
    )
    one.open()
    one.look()
    return one


def decoded(*rids: str) -> FakeBatch:
    batch = FakeBatch([request(rid, told={"slackwater_class": "offline"}) for rid in rids])
    batch.forward_mode = DecodeMode()
    return batch


def run(one: Reporter, clock: Clock, batch: FakeBatch, steps: int, us: float = 10_000) -> None:
    for _ in range(steps):
        clock.us += us
        for it in batch.reqs:
            it.output_ids.append(1)
        one.ended(batch)


def test_a_step_lasts_from_the_end_of_the_one_before_it() -> None:
    clock, seen = Clock(), []  # type: ignore[var-annotated]
    one = reporter(clock, Listener(), seen)
    batch = decoded("a", "b")
    run(one, clock, batch, 3)
    one.catch_up()
    assert [step[5] for step in seen[1:]] == [10_000, 10_000]
    assert [step[1:3] for step in seen] == [(2, 204), (2, 206), (2, 208)]


def test_after_an_idle_gap_it_lasts_from_its_own_launch() -> None:
    clock, seen = Clock(), []  # type: ignore[var-annotated]
    one = reporter(clock, Listener(), seen)
    batch = decoded("a")
    run(one, clock, batch, 1)
    batch.after_idle_gap, batch.launch_ts = True, (clock.us + 990_000) / 1e6
    run(one, clock, batch, 1, us=1_000_000)
    one.catch_up()
    assert seen[-1][5] == pytest.approx(10_000)


def test_steps_are_told_together_and_read_again_as_they_were() -> None:
    clock, listener = Clock(), Listener()
    one = reporter(clock, listener)
    run(one, clock, decoded("a", "b"), 60)
    told = [step for body in listener.sent for step in steps_of(body)]
    assert 1 < len(listener.sent) <= 60 * 10_000 / EVERY_US + 1
    assert told[5] == SeenStep(2, 214, 10_000.0)


def test_without_a_listener_nothing_is_noted_while_everybody_steps() -> None:
    clock, listener, seen = Clock(), Listener(heard=False), []  # type: ignore[var-annotated]
    one = reporter(clock, listener, seen)
    run(one, clock, decoded("a"), 100)
    one.catch_up()
    assert (listener.sent, seen) == ([], [])
    assert one.steps == 100


def test_who_begins_to_listen_is_told_of_what_comes_then() -> None:
    clock, listener, seen = Clock(), Listener(heard=False), []  # type: ignore[var-annotated]
    one = reporter(clock, listener, seen)
    batch = decoded("a")
    run(one, clock, batch, 2 * LOOK_EVERY - 1)
    listener.heard = True
    run(one, clock, batch, 3)
    one.catch_up()
    assert [step[5] for step in seen[1:]] == [10_000, 10_000]
    assert seen[0][2] == batch.reqs[0].seqlen - 2


def test_what_an_engine_noted_for_itself_is_not_told_to_who_comes_later() -> None:
    clock, listener = Clock(), Listener(heard=False)
    one = reporter(clock, listener, chooses=True)
    run(one, clock, decoded("a", "b", "c"), 30)
    listener.heard = True
    clock.us += 60_000_000
    run(one, clock, decoded("d"), 60)
    told = [step for body in listener.sent for step in steps_of(body)]
    assert {step[0] for step in told} == {1}


def test_an_engine_that_chooses_learns_of_its_steps_though_nobody_listens() -> None:
    clock, listener, seen = Clock(), Listener(heard=False), []  # type: ignore[var-annotated]
    one = reporter(clock, listener, seen, chooses=True)
    run(one, clock, decoded("a"), 60)
    one.catch_up()
    assert len(seen) == 60
    assert listener.sent == []


def test_steps_are_told_once_each_whenever_it_is_asked_for_them() -> None:
    clock, listener, seen = Clock(), Listener(), []  # type: ignore[var-annotated]
    one = reporter(clock, listener, seen)
    batch = decoded("a", "b")
    for number in range(60):
        run(one, clock, batch, 1)
        if number % 7 == 0:
            one.catch_up()
        if number == 30:
            batch.merge(request("c"))
    one.catch_up()
    told = [step for body in listener.sent for step in json.loads(body)["steps"]]
    assert [list(step) for step in seen[: len(told)]] == told
    assert [step[2] for step in seen] == [204 + 2 * i for i in range(31)] + [
        368 + 3 * i for i in range(29)
    ]


def test_a_port_that_is_taken_costs_the_reports_alone() -> None:
    def taken() -> Any:
        raise OSError("Address already in use")

    one = Reporter(Faults("reports"), Clock(), lambda _: None, lambda: False, lambda: 0, taken)
    one.open()
    assert "Address already in use" in one.faults.why_off


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"steps": 3}', b'{"steps": [[1, 2], "x", [1, -1, 0, 0, 0, 5, 0]]}'],
)
def test_reports_that_make_no_sense_hold_no_steps(body: bytes) -> None:
    assert list(steps_of(body)) == []


# What the gateway reads and says.


def state(**more: Any) -> dict[str, Any]:
    plugin = Plugin(Options(), {Feature.PREFILL: "a reason"}, Clock())
    return {**plugin.state(), **more}


def test_a_servers_state_is_read_as_it_was_told() -> None:
    heard = states_of({"internal_states": [{"slackwater": json.loads(json.dumps(state()))}]})
    assert heard is not None
    assert heard.features == {"decode", "reports"}
    assert heard.why_off == {"prefill": "a reason"}
    assert (heard.mode, heard.faults, heard.reports) == ("all", 0, ())


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"internal_states": []},
        {"internal_states": [{}]},
        {"internal_states": [{"slackwater": "on"}]},
        {"internal_states": [{"slackwater": {"features": {}}}, {}]},
    ],
)
def test_a_plug_in_that_is_not_in_every_rank_is_none(info: dict[str, Any]) -> None:
    assert states_of(info) is None


def test_a_feature_is_on_where_all_ranks_have_it() -> None:
    off = state()
    off["features"]["decode"] = {"on": False, "why_off": "3 faults", "faults": 3}
    heard = states_of({"internal_states": [{"slackwater": state()}, {"slackwater": off}]})
    assert heard is not None
    assert heard.features == {"reports"}
    assert heard.why_off["decode"] == "3 faults"
    assert heard.faults == 3


def test_what_is_set_is_numbers_under_our_prefix() -> None:
    assert json.loads(setting(mode=1, lease_s=30.0)) == {
        "server_args": {"slackwater_mode": 1, "slackwater_lease_s": 30.0}
    }


def job(kind: Kind, tpot_us: int = 0) -> Job:
    return Job("j", kind, "", 10, 10, 0, 0, 0, tpot_us=tpot_us)


def test_a_request_says_its_class_and_target_and_keeps_its_own_words() -> None:
    online = job(Kind.ONLINE, 40_000)
    words = {"slackwater_class": "online", "slackwater_tpot_ms": 40.0}
    chat = {"messages": [], "custom_params": {"mine": 1}}
    native = {"input_ids": [1], "sampling_params": {"temperature": 0, "custom_params": {"mine": 1}}}
    assert told(online, chat) == {"custom_params": {"mine": 1, **words}}
    assert told(online, native) == {
        "sampling_params": {"temperature": 0, "custom_params": {"mine": 1, **words}}
    }
    assert told(job(Kind.OFFLINE), {"prompt": "x"}) == {
        "custom_params": {"slackwater_class": "offline"}
    }
