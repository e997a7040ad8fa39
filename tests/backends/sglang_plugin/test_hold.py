"""Steps that a drill holds to a line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from backends.sglang_plugin import door
from backends.sglang_plugin.control import Control, Refused, Setting, adjusted, setting_of
from backends.sglang_plugin.plugin import Options, Plugin
from backends.sglang_plugin.targets import HOLD, SCHEDULER
from policies.step_line import StepLine
from tests.backends.sglang_plugin.fakes import Clock, DecodeMode, FakeBatch, request

LINE = StepLine(1_000.0, 100.0, 1.0)


class Engine:
    """Its own step takes so long."""

    def __init__(self, took_us: float, mode: Any = None) -> None:
        self.clock = Clock()
        self.slept_us: list[float] = []
        self.plugin = Plugin(Options(drill=True), {}, self.clock)
        self.plugin.hold._pause_us = self.slept_us.append
        self.batch: Any = FakeBatch([request("a"), request("b")])
        self.batch.forward_mode = mode or DecodeMode()
        self._took_us = took_us

    def runs(self, *given: Any) -> Any:
        def original(engine: Any, batch: Any, *more: Any) -> Any:
            self.clock.us += self._took_us
            for row in batch.reqs:
                row.output_ids.append(1)
            return batch, more

        return self.plugin.run_batch(original, SimpleNamespace(), self.batch, *given)

    @property
    def held(self) -> tuple[int, int]:
        return self.plugin.hold.steps, self.plugin.hold.late


def test_what_the_engine_leaves_of_the_line_is_slept() -> None:
    engine = Engine(took_us=300.0)
    engine.plugin._adopt(Control(held=LINE))
    engine.runs()
    assert engine.slept_us == [1_000 + 2 * 100 + 2 * 101 - 300]  # contexts as the step began
    assert engine.held == (1, 0)


def test_a_step_that_takes_longer_by_itself_is_counted_and_not_held() -> None:
    engine = Engine(took_us=5_000.0)
    engine.plugin._adopt(Control(held=LINE))
    assert engine.runs("proxy") == (engine.batch, ("proxy",))
    assert (engine.slept_us, engine.held) == ([], (1, 1))


def test_nothing_is_held_unasked_and_no_prompt_ever() -> None:
    unasked = Engine(took_us=300.0)
    prompt = Engine(took_us=300.0, mode=SimpleNamespace(is_decode=lambda: False))
    prompt.plugin._adopt(Control(held=LINE))
    for engine in (unasked, prompt):
        engine.runs()
        assert (engine.slept_us, engine.held) == ([], (0, 0))


def test_a_line_to_hold_is_for_drills_and_can_be_taken_back() -> None:
    told = {"slackwater_held_base_us": 900, "slackwater_held_token_us": 2}
    with pytest.raises(Refused, match="drill"):
        setting_of(told, drill=False)
    held = adjusted(Control(), setting_of(told, drill=True), 0.0)
    assert (held.held, held.line) == (StepLine(900.0, 0.0, 2.0), None)
    assert adjusted(held, Setting(mode=2), 0.0).held == held.held
    assert adjusted(held, Setting(held_base_us=0.0), 0.0).held is None


def test_only_a_drill_hooks_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "why_not", lambda *_, **__: "")
    assert door.drilled(Options(), "0.5.23") == []
    assert door.drilled(Options(drill=True), "0.5.23") == [SCHEDULER + "run_batch"]
    monkeypatch.setattr(door, "why_not", lambda need, *_, **__: "gone" if need is HOLD else "")
    assert door.drilled(Options(drill=True), "0.6.0") == []


def test_steps_correct_what_is_believed_of_them_unless_a_drill_told_the_line() -> None:
    plugin = Plugin(Options(drill=True), {}, Clock())
    corrected: list[bool] = []
    told: Any = SimpleNamespace(
        adopt=lambda line: None, saw=lambda steps, *, corrects: corrected.append(corrects)
    )
    plugin.gate.belief = told
    for line in (None, LINE):
        plugin._adopt(Control(mode="slack", line=line, held=LINE))
        plugin._saw([(1, 2, 200, 0, 0, 1_400, 0)])
    assert corrected == [True, False]
