"""What the hooks of one process say and leave alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from backends.sglang_plugin.control import Setting, adjusted
from backends.sglang_plugin.plugin import STATE, Options, Plugin
from tests.backends.sglang_plugin.fakes import Clock


def plugin(clock: Clock) -> Plugin:
    """It has met its scheduler."""
    one = Plugin(Options(), {}, clock)
    one._met = SimpleNamespace()  # type: ignore[assignment]
    return one


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
