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

STEPS = 20_000
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


class _Heard:
    """A socket with a listener, which sends into nothing."""

    endpoint = "inproc"

    def is_heard(self) -> bool:
        return True

    def send(self, number: int, steps: list[Step]) -> None:
        orjson.dumps({"steps": steps})


def resting_us(steps: int = STEPS) -> float:
    """CPU time of one step; the least of five rounds, because others use the machine."""
    return min(_round_us(steps // 5) for _ in range(5))


def _round_us(steps: int) -> float:
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
    plugin.reporter = _reporter(plugin)
    hooks = (
        (_hooked(plugin.update_running_batch, lambda engine, batch: batch), (engine, batch)),
        (_hooked(plugin.prepare_for_decode, lambda batch: None), (batch,)),
        (
            _hooked(plugin.get_next_disagg_decode_batch_to_run, lambda engine, running: plan),
            (engine, batch),
        ),
        (_hooked(plugin.get_new_batch_prefill, lambda engine, running: plan), (engine, batch)),
        (
            _hooked(plugin.process_batch_result, lambda engine, batch, result: None),
            (engine, batch, None),
        ),
    )
    originals = ((lambda *given: None),) * len(hooks)
    hooked_s = _took_s([call for call, _ in hooks], [given for _, given in hooks], steps)
    bare_s = _took_s(list(originals), [given for _, given in hooks], steps)
    return (hooked_s - bare_s) * 1e6 / steps


def _reporter(plugin: Plugin) -> Reporter:
    """With a listener: what is told costs, too."""
    one = Reporter(plugin.reporter.faults, now_us, plugin._saw, lambda: 0, lambda: _Heard())  # type: ignore[arg-type,return-value]
    one.open()
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
