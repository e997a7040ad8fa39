"""Runs the core on a clock: the one place where decisions become effects, live and simulated."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from backends.base import Actuator, Backend
from gateway.core import Core
from policies.clock import Clock, Timer
from policies.events import (
    Cancel,
    Continue,
    Decision,
    Dispatch,
    Event,
    Fail,
    Failed,
    Fault,
    Freed,
    Pause,
    PauseRefused,
    Preempt,
    Preempted,
    Reject,
    Release,
    RoleSwitched,
    SwitchOver,
    SwitchRole,
    WakeAt,
    Wakeup,
)

log = structlog.get_logger("slackwater.driver")

Observer = Callable[[int, Decision], None]
Listener = Callable[[int, Event], None]


class Driver:
    """Collects the events of one instant and hands them to the core together."""

    def __init__(
        self,
        core: Core,
        clock: Clock,
        backend: Backend,
        observe: Observer | None = None,
        *,
        actuator: Actuator | None = None,
        listen: Listener | None = None,
    ) -> None:
        self.core = core
        self._clock = clock
        self._backend = backend
        self._observe = observe
        self._actuator = actuator
        self.listen = listen
        self._inbox: list[Event] = []
        self._alarm: Timer | None = None
        backend.connect(self.post)
        if actuator is not None:
            actuator.connect(self.post)

    def post(self, event: Event) -> None:
        self._inbox.append(event)
        if len(self._inbox) == 1:
            self._clock.call_at(self._clock.time(), self._drain)

    def _drain(self) -> None:
        now_us = round(self._clock.time() * 1e6)
        events, self._inbox = self._inbox, []
        if self.listen is not None:
            for event in events:
                self.listen(now_us, event)
        for decision in self.core.handle(events, now_us):
            if self._observe is not None:
                self._observe(now_us, decision)
            try:
                self._do(decision)
            except Exception:  # one decision's failure must not undo the others of its instant
                log.exception("a decision failed", decision=type(decision).__name__)
                self._contain(decision)

    def _contain(self, decision: Decision) -> None:
        """A bug, but no job may hang for it: what was not started has failed."""
        if isinstance(decision, Dispatch):
            self.post(Failed(decision.job.id, Fault.ENGINE))
        elif isinstance(decision, Cancel):
            self.post(Freed(decision.job.id))
        elif isinstance(decision, SwitchRole | Release):
            self.post(RoleSwitched(decision.worker, None, "the gateway failed to ask for it"))
        elif isinstance(decision, Preempt):
            self.post(Preempted(decision.job.id))
        elif isinstance(decision, Pause):
            self.post(PauseRefused(decision.worker))

    def _do(self, decision: Decision) -> None:
        match decision:
            case Dispatch():
                self._backend.start(decision)
            case Preempt():
                self._backend.preempt(decision)
            case Cancel(job, _):
                self._backend.stop(job)
            case Reject() | Fail():
                self._backend.refuse(decision)
            case Pause():
                self._backend.pause(decision)
            case Continue():
                self._backend.go_on(decision)
            case SwitchRole() | Release():
                self._move(decision)
            case SwitchOver():
                pass  # for those who observe
            case WakeAt(us):
                self._wake_at(us)

    def _move(self, decision: SwitchRole | Release) -> None:
        if self._actuator is not None:
            self._actuator.move(decision)
            return
        role = self.core.ledgers[decision.worker].worker.role
        self.post(RoleSwitched(decision.worker, role, "nobody is there to do it"))

    def _wake_at(self, us: int) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = self._clock.call_at(us / 1e6, self.post, Wakeup())
