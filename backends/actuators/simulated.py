"""Role switches and changes of size in virtual time, with what they take and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from backends.base import Post
from backends.engine import Engine
from policies.clock import Clock
from policies.events import Event, Release, RoleSwitched, SwitchRole, WorkerGone, WorkerUp
from policies.types import Role, Worker

NOT_IDLE_AGAIN_S = 0.1
"""A server that is not idle yet is asked again; an abort takes a step or two to get through."""
MOST_TRIES = 100


@dataclass(slots=True)
class _Slot:
    """Room for one server, and what of the time it was paid for."""

    engine: Engine
    gpus: int
    since_s: float | None
    """When it was last started; None while there is no server in it."""
    used_s: float = 0.0
    is_starting: bool = False

    def running_s(self, now_s: float) -> float:
        return 0.0 if self.since_s is None else max(0.0, now_s - self.since_s)


class SimulatedActuator:
    """Switches engines, stops them and starts them again in any role."""

    def __init__(
        self,
        engines: Iterable[Engine],
        clock: Clock,
        describe: Callable[[Engine], Worker],
        *,
        gpus: Mapping[str, int] | None = None,
        paid_from_s: Mapping[str, float | None] | None = None,
        launch_s: float = 45.0,
    ) -> None:
        self._clock = clock
        self._describe = describe
        self._post: Post = _nobody
        self._launch_s = launch_s
        self._slots = {}
        for engine in engines:
            since_s = (paid_from_s or {}).get(engine.name, 0.0)
            self._slots[engine.name] = _Slot(engine, (gpus or {}).get(engine.name, 1), since_s)
            if since_s is None:
                engine.kill()
        self.switched = self.launched = self.released = 0

    def connect(self, post: Post) -> None:
        self._post = post

    def move(self, decision: SwitchRole | Release) -> None:
        engine = self._slots[decision.worker].engine
        if isinstance(decision, Release):
            self._stop(engine)
        else:
            self._switch(engine, decision.role, MOST_TRIES)

    def _switch(self, engine: Engine, role: Role, tries: int) -> None:
        refusal = engine.refuses_role(role)
        if not engine.alive:
            self._post(RoleSwitched(engine.name, None, "it is dead"))
        elif refusal is not None and not engine.idle and tries:
            self._later(NOT_IDLE_AGAIN_S, self._switch, engine, role, tries - 1)
        elif refusal is not None:
            self._post(RoleSwitched(engine.name, engine.role, refusal))
        else:
            engine.switch_role(role, lambda: self._switched(engine))

    def _switched(self, engine: Engine) -> None:
        self.switched += 1
        # What a probe would have found out comes first: the role alone does not make a worker.
        self._post(WorkerUp(self._describe(engine)))
        self._post(RoleSwitched(engine.name, engine.role))

    # Size.

    @property
    def starting(self) -> dict[Role, int]:
        """Servers that are on their way."""
        coming: dict[Role, int] = {}
        for slot in self._slots.values():
            if slot.is_starting:
                coming[slot.engine.role] = coming.get(slot.engine.role, 0) + 1
        return coming

    def launch(self, role: Role) -> bool:
        """Starts a server where there is room for one; whether there was."""
        slot = next((it for it in self._slots.values() if it.since_s is None), None)
        if slot is None:
            return False
        self.launched += 1
        slot.since_s, slot.is_starting = self._clock.time(), True
        slot.engine.machine.take_role(role)
        self._later(self._launch_s, self._launched, slot, role)
        return True

    def _launched(self, slot: _Slot, role: Role) -> None:
        slot.is_starting = False
        slot.engine.revive()
        slot.engine.machine.take_role(role)
        self._post(WorkerUp(self._describe(slot.engine)))

    def _stop(self, engine: Engine) -> None:
        """It is off the list first: nothing is sent to a server that is about to end."""
        slot = self._slots[engine.name]
        self.released += 1
        self._post(WorkerGone(engine.name))
        engine.kill()
        if slot.since_s is not None:
            slot.used_s += self._clock.time() - slot.since_s
            slot.since_s = None

    def gpu_s(self, now_s: float) -> float:
        """What was paid for so far, starting and switching included."""
        return sum(
            slot.gpus * (slot.used_s + slot.running_s(now_s)) for slot in self._slots.values()
        )

    def _later(self, seconds: float, callback: Callable[..., object], *args: object) -> None:
        self._clock.call_at(self._clock.time() + seconds, callback, *args)


def _nobody(event: Event) -> None:
    raise RuntimeError(f"{event} before anyone listens")
