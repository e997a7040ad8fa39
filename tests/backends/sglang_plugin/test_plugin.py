"""What the hooks of one process say and leave alone."""

from __future__ import annotations

import sys
from math import inf
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backends.sglang_plugin.belief import FEWEST_STEPS
from backends.sglang_plugin.control import Setting, adjusted
from backends.sglang_plugin.plugin import STATE, Options, Plugin
from backends.sglang_plugin.targets import Feature
from tests.backends.sglang_plugin.fakes import Clock, DecodeMode, FakeBatch, prepare, request


def plugin(clock: Clock) -> Plugin:
    """It has met its scheduler."""
    one = Plugin(Options(), {}, clock)
    one._met = SimpleNamespace()
    return one


class Silent:
    """A socket that nobody listens at."""

    endpoint = "tcp://127.0.0.1:1"

    def is_heard(self) -> bool:
        return False


def state(one: Plugin) -> dict[str, Any]:
    answer = one.get_internal_state(
        lambda *_: SimpleNamespace(internal_state={}), SimpleNamespace(), None
    )
    told: dict[str, Any] = answer.internal_state[STATE]
    return told


def test_a_server_starts_as_stock_sglang() -> None:
    told = state(plugin(Clock()))
    assert (told["mode"], told["displace"], told["parked"]) == ("all", False, 0)


def test_an_idle_server_too_is_stock_sglang_again_when_its_lease_is_over() -> None:
    clock = Clock()
    one = plugin(clock)
    one._adopt(adjusted(one.control, Setting(mode=1, displace=1, lease_s=2), clock.us))
    assert (state(one)["mode"], state(one)["displace"]) == ("online-first", True)
    clock.us += 2.1e6
    assert (state(one)["mode"], state(one)["displace"]) == ("all", False)


@pytest.mark.parametrize("told", [{"lease_s": 60}, {"tpot_us": 9_000}])
def test_what_is_set_after_a_lease_is_set_over_nothing_of_it_and_stays(
    told: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = SimpleNamespace(SetInternalStateReqOutput=SimpleNamespace)
    monkeypatch.setitem(cast("Any", sys.modules), "sglang.srt.managers.io_struct", words)
    clock = Clock()
    one = plugin(clock)
    one._adopt(adjusted(one.control, Setting(mode=1, base_us=900.0, lease_s=2), clock.us))
    clock.us += 2.1e6
    call = SimpleNamespace(server_args={f"slackwater_{key}": told[key] for key in told})
    assert one.set_internal_state(lambda *_: None, SimpleNamespace(), call).updated
    clock.us += 1e6
    assert (state(one)["mode"], state(one)["line_from"]) == ("all", "")
    assert (one.control.tpot_us, one.control.until_us - clock.us) == (
        (0.0, 59e6) if "lease_s" in told else (9_000.0, inf)
    )


def test_a_step_of_a_server_at_rest_is_the_engines_own() -> None:
    one, plan = plugin(Clock()), SimpleNamespace(running_batch="whole")
    asked: list[tuple[Any, ...]] = []

    def original(*given: Any) -> Any:
        asked.append(given)
        return plan

    engine: Any = SimpleNamespace(chunked_req=None)
    batch: Any = object()
    for hook in (
        one.update_running_batch,
        one.get_next_disagg_decode_batch_to_run,
        one.get_new_batch_prefill,
    ):
        assert hook(original, engine, batch) is plan
    one.prepare_for_decode(original, batch)
    assert asked == [(engine, batch)] * 3 + [(batch,)]


def test_an_engine_that_chooses_fits_its_own_line_to_its_own_steps() -> None:
    clock = Clock()
    one = plugin(clock)
    one.reporter.socket = Silent()  # type: ignore[assignment]
    one._adopt(adjusted(one.control, Setting(mode=2), clock.us))
    for number in range(2 * FEWEST_STEPS):
        batch = FakeBatch([request(f"{number} {i}") for i in range(1 + number % 4)])
        batch.forward_mode = DecodeMode()
        clock.us += 3_000.0 + 1_000.0 * len(batch.reqs)
        one.process_batch_result(lambda *_: None, SimpleNamespace(), batch, None)
    crowd: Any = FakeBatch([request(f"c{i}") for i in range(4)])
    one.update_running_batch(lambda _, batch: batch, SimpleNamespace(), crowd)
    one.gate.begins(crowd)
    one.prepare_for_decode(prepare, crowd)  # type: ignore[arg-type]
    assert one.faults[Feature.DECODE].number == 0
    assert one.gate.belief.step_us(4, 404, 0) == pytest.approx(7_000.0, rel=0.01)
    assert state(one)["line_from"] == "steps"


def test_a_server_says_whose_word_on_steps_it_goes_by() -> None:
    clock = Clock()
    one = plugin(clock)
    assert state(one)["line_from"] == ""
    one._adopt(adjusted(one.control, Setting(mode=1, base_us=900.0), clock.us))
    assert state(one)["line_from"] == "gateway"
    one._adopt(adjusted(one.control, Setting(base_us=0.0), clock.us))
    assert (state(one)["line_from"], state(one)["mode"]) == ("", "online-first")
