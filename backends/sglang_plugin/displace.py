"""Which prompt a prefill step computes: an online one goes before an offline one in its chunks.

SGLang holds at most one prompt that is in its chunks. Put aside at a chunk's end it keeps its place
in memory and what is computed; it goes on when no online prompt waits any more, or when it has
waited long enough. Only offline prompts are put aside, so there is never more than one.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Final

from backends.sglang_plugin.contract import Batch, Plan, Request, Scheduler
from backends.sglang_plugin.faults import Faults
from backends.sglang_plugin.riders import is_offline

Original = Callable[[Any, Batch], Plan]
MOST_ASIDE_US: Final = 10_000_000.0
"""After so long it computes one more chunk, whoever waits."""


class Displacement:
    def __init__(self, faults: Faults, now_us: Callable[[], float]) -> None:
        self.faults = faults
        self.until_us = -inf
        """For so long it is allowed."""
        self.aside: Request | None = None
        self.displaced = self.resumed = 0
        self._now_us = now_us
        self._since_us = 0.0

    @property
    def allowed(self) -> bool:
        return not self.faults.over and self._now_us() <= self.until_us

    def plan(self, original: Original, engine: Scheduler, running: Batch) -> Plan:
        """SGLang's own plan, over what may be computed now."""
        current, aside = engine.chunked_req, self.aside
        if aside is None:
            if current is None or not engine.waiting_queue or not self._gives_way(engine, current):
                return original(engine, running)
            self.aside, engine.chunked_req = current, None
            self._since_us = self._now_us()
            self.displaced += 1
        elif current is None and self._goes_on(engine):
            return self._resumed(original, engine, running)
        return self._without_offline(original, engine, running)

    def _gives_way(self, engine: Scheduler, current: Request) -> bool:
        if not self.allowed or current.pending_bootstrap:
            return False
        if engine.enable_overlap and engine.disaggregation_mode.value == "prefill":
            return False  # it has switched its role since it was looked at
        if current.to_finish is not None or engine._pending_chunked_abort_req is not None:
            return False
        try:
            return is_offline(current) and _online_waits(engine)
        except Exception as error:  # noqa: BLE001  # the engine goes on without
            self.faults.count(error)
            return False

    def _goes_on(self, engine: Scheduler) -> bool:
        if not self.allowed:
            return True
        return self._now_us() - self._since_us > MOST_ASIDE_US or not _online_waits(engine)

    def _without_offline(self, original: Original, engine: Scheduler, running: Batch) -> Plan:
        queue = engine.waiting_queue
        offline = [request for request in queue if is_offline(request)]
        engine.waiting_queue = [request for request in queue if not is_offline(request)]
        try:
            plan = original(engine, running)
        finally:
            engine.waiting_queue = engine.waiting_queue + offline
        if plan.batch_to_run is None and engine.chunked_req is None:
            return self._resumed(original, engine, plan.running_batch)  # there is no room for them
        return plan

    def _resumed(self, original: Original, engine: Scheduler, running: Batch) -> Plan:
        engine.chunked_req, self.aside = self.aside, None
        self.resumed += 1
        return original(engine, running)

    def abort(self, engine: Scheduler, asked: Any) -> None:
        """The one put aside ends as SGLang ends a prompt in its chunks."""
        aside = self.aside
        if aside is None or not (asked.abort_all or aside.rid.startswith(asked.rid)):
            return
        self.aside = None
        current, pending = engine.chunked_req, engine._pending_chunked_abort_req
        engine.chunked_req = engine._pending_chunked_abort_req = aside
        try:
            engine.process_pending_chunked_abort()
        finally:
            engine.chunked_req, engine._pending_chunked_abort_req = current, pending

    def pause(self, engine: Scheduler, asked: Any) -> None:
        """A pause that takes everything back takes back the one put aside, too."""
        is_unified = engine.disaggregation_mode.value == "null"
        if asked.mode == "retract" and self.aside is not None and is_unified:
            running = engine.running_batch
            running.reqs = [*running.reqs, self.aside]
            self.aside = None


def _online_waits(engine: Scheduler) -> bool:
    return any(not is_offline(request) for request in engine.waiting_queue)
