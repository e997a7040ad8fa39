"""Which prompt a prefill step computes, and what becomes of the one put aside."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace
from typing import Any

from backends.sglang_plugin.displace import MOST_ASIDE_US, Displacement
from backends.sglang_plugin.faults import Faults
from tests.backends.sglang_plugin.fakes import Clock, FakeRequest, request


class Engine:
    """A scheduler that computes one chunk a step: of the prompt in its chunks, or of the first."""

    def __init__(self) -> None:
        self.waiting_queue: list[Any] = []
        self.chunked_req: Any = None
        self._pending_chunked_abort_req: Any = None
        self.disaggregation_mode = SimpleNamespace(value="null")
        self.enable_overlap = False
        self.tp_worker: Any = None
        self.running_batch = SimpleNamespace(reqs=[])
        self.chunks: dict[str, int] = {}
        self.is_full = False
        self.aborted: list[str] = []

    def step(self, displacement: Displacement) -> str:
        plan = displacement.plan(plan_of, self, self.running_batch)
        return str(plan.batch_to_run or "")

    def process_pending_chunked_abort(self) -> None:
        self.aborted.append(self.chunked_req.rid)
        self.chunked_req = self._pending_chunked_abort_req = None


def plan_of(engine: Engine, running: Any) -> Any:
    current = engine.chunked_req
    if current is None and engine.waiting_queue and not engine.is_full:
        current = engine.waiting_queue.pop(0)
    if current is None:
        return SimpleNamespace(batch_to_run=None, running_batch=running)
    engine.chunks[current.rid] = engine.chunks.get(current.rid, 3) - 1
    engine.chunked_req = current if engine.chunks[current.rid] else None
    return SimpleNamespace(batch_to_run=current.rid, running_batch=running)


def offline(rid: str) -> FakeRequest:
    return request(rid, told={"slackwater_class": "offline"})


def displacement(clock: Clock | None = None) -> Displacement:
    one = Displacement(Faults("prefill"), clock or Clock())
    one.until_us = inf
    return one


def under_way(one: Displacement) -> Engine:
    engine = Engine()
    engine.waiting_queue = [offline("off")]
    assert engine.step(one) == "off"
    return engine


def test_an_online_prompt_goes_first_and_the_other_goes_on_after_it() -> None:
    one = displacement()
    engine = under_way(one)
    engine.waiting_queue = [offline("late"), request("on")]
    steps = [engine.step(one) for _ in range(8)]
    assert steps == ["on"] * 3 + ["off"] * 2 + ["late"] * 3
    assert (one.displaced, one.resumed, one.aside) == (1, 1, None)


def test_where_nobody_online_waits_nothing_changes() -> None:
    one = displacement()
    engine = under_way(one)
    engine.waiting_queue = [offline("late")]
    assert [engine.step(one) for _ in range(3)] == ["off", "off", "late"]
    assert one.displaced == 0


def test_an_online_prompt_is_never_put_aside() -> None:
    one, engine = displacement(), Engine()
    engine.waiting_queue = [request("first"), request("second")]
    assert [engine.step(one) for _ in range(4)] == ["first"] * 3 + ["second"]


def test_where_there_is_no_room_for_the_online_prompt_the_other_goes_on_at_once() -> None:
    one = displacement()
    engine = under_way(one)
    engine.waiting_queue, engine.is_full = [request("on")], True
    assert engine.step(one) == "off"
    assert one.aside is None


def test_a_prompt_whose_peer_has_not_come_is_left_alone() -> None:
    one = displacement()
    engine = under_way(one)
    engine.chunked_req.pending_bootstrap = True
    engine.waiting_queue = [request("on")]
    assert engine.step(one) == "off"


def test_nobody_waits_aside_for_ever() -> None:
    clock = Clock()
    one = displacement(clock)
    engine = under_way(one)
    ran = []
    for number in range(40):
        engine.waiting_queue.append(request(f"on{number}"))
        engine.chunks[f"on{number}"] = 1
        ran.append(engine.step(one))
        clock.us += MOST_ASIDE_US / 10
    assert ran.count("off") == 2


def test_an_abort_of_the_one_aside_ends_it_and_nobody_else() -> None:
    one = displacement()
    engine = under_way(one)
    engine.waiting_queue = [request("on")]
    engine.step(one)
    one.abort(engine, SimpleNamespace(abort_all=False, rid="off"))
    assert engine.aborted == ["off"]
    assert engine.chunked_req.rid == "on"
    assert [engine.step(one) for _ in range(3)] == ["on", "on", ""]


def test_a_pause_that_takes_everything_back_takes_it_too() -> None:
    one = displacement()
    engine = under_way(one)
    engine.waiting_queue = [request("on")]
    engine.step(one)
    one.pause(engine, SimpleNamespace(mode="retract"))
    assert [it.rid for it in engine.running_batch.reqs] == ["off"]
    assert one.aside is None


def test_switched_off_with_one_aside_it_goes_on_when_the_slot_is_free() -> None:
    one = displacement()
    engine = under_way(one)
    engine.waiting_queue = [request("on"), request("next")]
    engine.step(one)
    one.until_us = -inf
    assert [engine.step(one) for _ in range(5)] == ["on", "on", "off", "off", "next"]


def test_what_a_gateway_lent_ends_with_its_lease() -> None:
    clock = Clock()
    one = displacement(clock)
    engine = under_way(one)
    one.until_us = clock.us + 1_000.0
    engine.waiting_queue = [request("on")]
    assert engine.step(one) == "on"
    clock.us += 2_000.0
    engine.waiting_queue = [request("next")]
    assert [engine.step(one) for _ in range(5)] == ["on", "on", "off", "off", "next"]
