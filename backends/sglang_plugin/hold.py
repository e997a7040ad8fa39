"""A drill: decode steps that last as long as a line says, as on a device with a clock of its own.

The engine's own work on the step counts; what it leaves of the line is slept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backends.sglang_plugin.contract import Batch
from policies.step_line import StepLine


class Hold:
    """From the launch of a step to its result: what lies between two steps is not held."""

    __slots__ = ("_now_us", "_pause_us", "late", "line", "steps")

    def __init__(self, now_us: Callable[[], float], pause_us: Callable[[float], None]) -> None:
        self.line: StepLine | None = None
        self.steps = self.late = 0
        """The second: those for which the engine alone took longer than the line."""
        self._now_us = now_us
        self._pause_us = pause_us

    def run(self, original: Callable[..., Any], engine: Any, batch: Batch, given: Any) -> Any:
        line, began_us = self.line, self._now_us()
        if line is None or not batch.forward_mode.is_decode():
            return original(engine, batch, *given)
        contexts = [request.seqlen for request in batch.reqs]
        out = original(engine, batch, *given)
        left_us = began_us + line.step_us(len(contexts), sum(contexts)) - self._now_us()
        self.steps += 1
        if left_us > 0:
            self._pause_us(left_us)
        else:
            self.late += 1
        return out
