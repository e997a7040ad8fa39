"""The way from a client through a door into the gateway, and what a door sees there."""

from __future__ import annotations

from collections.abc import Callable

from backends.simulated import Grid, SimulatedBackend, Work
from gateway.core import Core
from gateway.driver import Driver
from gateway.simulation.budget import BudgetEntry
from gateway.simulation.doors import Door
from policies.events import Arrived, Left
from policies.ledger import Ledger
from policies.types import Job, Kind, Role


class Entrance:
    """The way from a client through a door into the gateway."""

    def __init__(
        self,
        core: Core,
        driver: Driver,
        backend: SimulatedBackend,
        clock: Grid,
        budget: BudgetEntry,
    ) -> None:
        self._core, self._driver, self._backend, self._clock = core, driver, backend, clock
        self.budget = budget
        self._work: dict[str, Work] = {}

    def open(self, job: Job, work: Work) -> None:
        self._work[job.id] = work
        self._backend.open(job.id, work)

    def close(self, job_id: str) -> None:
        self._work.pop(job_id, None)

    # What a door sees and does.

    @property
    def slots(self) -> int:
        return sum(ledger.max_running for ledger in self._decoding())

    @property
    def online_waiting(self) -> int:
        return self._core.queued(Kind.ONLINE)

    @property
    def kv_use(self) -> float:
        told = [(e.load.used_tokens, e.kv_tokens) for e in self._decoding() if e.load]
        return max((used / capacity for used, capacity in told if capacity), default=0.0)

    def _decoding(self) -> list[Ledger]:
        """Those of the moment: servers join, leave and change their roles."""
        return [e for e in self._core.ledgers.values() if e.worker.role is not Role.PREFILL]

    @property
    def decoding_servers(self) -> int:
        return len(self._decoding())

    @property
    def context_tokens(self) -> int:
        return sum(e.load.used_tokens for e in self._decoding() if e.load)

    @property
    def now_s(self) -> float:
        return self._clock.time()

    def enter(self, job: Job) -> None:
        self._driver.post(Arrived(job))

    def turn_out(self, job: Job, again_s: float) -> None:
        self._driver.post(Left(job.id))
        self.call_in(again_s, self._come_again, job)

    def call_in(self, seconds: float, callback: Callable[..., object], *given: object) -> None:
        self._clock.call_at(self._clock.time() + seconds, callback, *given)

    def _come_again(self, job: Job) -> None:
        """Unless its answer was complete when it was turned out."""
        if (work := self._work.get(job.id)) is not None:
            self._backend.open(job.id, work)
            self.door.arrived(job)

    door: Door
