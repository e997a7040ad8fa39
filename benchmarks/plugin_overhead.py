"""What the hooks cost a step while everybody steps, over an engine that does nothing itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson

from backends.sglang_plugin.clock import now_us
from backends.sglang_plugin.plugin import Options, Plugin
from backends.sglang_plugin.reports import Reporter, Step

STEPS, ROUNDS = 20_000, 20
REQUESTS = 32


class _Request:
    """As long as SGLang's own to ask."""

    def __init__(self) -> None:
        self.origin_input_ids = [1] * 1_000
        self.output_ids = [1]
        self.to_finish = None
        self.sampling_params = SimpleNamespace(custom_params={"slackwater_class": "online"})

    @property
    def seqlen(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)


class _Mode:
    def is_decode(self) -> bool:
        return True

    def is_extend(self) -> bool:
        return False


class _Socket:
    """One that sends into nothing."""

    endpoint = "inproc"

    def __init__(self, *, heard: bool) -> None:
        self._heard = heard

    def is_heard(self) -> bool:
        return self._heard

    def send(self, number: int, steps: list[Step]) -> None:
        orjson.dumps({"steps": steps})


def resting_us(*, heard: bool, steps: int = STEPS) -> list[float]:
    """CPU time of one step, round by round."""
    return [_round_us(steps // ROUNDS, heard=heard) for _ in range(ROUNDS)]


def _round_us(steps: int, *, heard: bool) -> float:
    """Of the server that calls the most of them."""
    plugin = Plugin(Options(), {}, now_us)
    batch: Any = SimpleNamespace(
        reqs=[_Request() for _ in range(REQUESTS)],
        forward_mode=_Mode(),
        after_idle_gap=False,
        launch_ts=0.0,
        extend_num_tokens=0,
    )
    plan: Any = SimpleNamespace(running_batch=batch, batch_to_run=batch)
    engine: Any = SimpleNamespace(chunked_req=None)
    plugin._met = engine  # it has been met: the server's settings are not part of a step
    plugin.reporter = _reporter(plugin, heard=heard)
    always = (
        (_hooked(plugin.update_running_batch, lambda engine, batch: batch), (engine, batch)),
        (_hooked(plugin.prepare_for_decode, lambda batch: None), (batch,)),
        (
            _hooked(plugin.process_batch_result, lambda engine, batch, result: None),
            (engine, batch, None),
        ),
    )
    decode = _hooked(plugin.get_next_disagg_decode_batch_to_run, lambda engine, running: plan)
    unified = _hooked(plugin.get_new_batch_prefill, lambda engine, running: plan)
    return max(
        _added_us([*always, (either, (engine, batch))], steps) for either in (decode, unified)
    )


def _added_us(hooks: list[tuple[Callable[..., Any], tuple[Any, ...]]], steps: int) -> float:
    given = [arguments for _, arguments in hooks]
    hooked_s = _took_s([call for call, _ in hooks], given, steps)
    bare_s = _took_s([lambda *given: None] * len(hooks), given, steps)
    return (hooked_s - bare_s) * 1e6 / steps


def _reporter(plugin: Plugin, *, heard: bool) -> Reporter:
    """With a listener: what is told costs, too."""
    socket: Any = _Socket(heard=heard)
    one = Reporter(
        plugin.reporter.faults, now_us, plugin._saw, lambda: False, lambda: 0, lambda: socket
    )
    one.open()
    one.look()
    return one


def _hooked(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """As SGLang's registry wraps an original."""

    def wrapper(*given: Any, **named: Any) -> Any:
        return hook(original, *given, **named)

    return wrapper


def _took_s(calls: list[Callable[..., Any]], given: list[Any], steps: int) -> float:
    began_s = time.thread_time()
    for _ in range(steps):
        for call, arguments in zip(calls, given, strict=True):
            call(*arguments)
    return time.thread_time() - began_s
