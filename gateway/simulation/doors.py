"""Who lets requests into the gateway: nobody, or the admission that others put before theirs.

A door is what a peer has instead of a scheduler: it counts what is inside and holds back the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from gateway.simulation.budget import BudgetEntry, LatencyBudget
from policies.types import Job, Kind

AGAIN_S = 1.0
"""A client that hears 429 or 503 asks again after this, as Retry-After says."""


class Hall(Protocol):
    """What a door sees of the fleet behind it, and what it can do."""

    @property
    def slots(self) -> int:
        """Requests that the servers would decode at once, by their own word."""
        ...

    @property
    def online_waiting(self) -> int:
        """Online requests that no server has yet."""
        ...

    @property
    def kv_use(self) -> float:
        """Of the fullest server that decodes, as it was last reported."""
        ...

    @property
    def decoding_servers(self) -> int: ...

    @property
    def context_tokens(self) -> int:
        """Of all that decodes, as it was last reported."""
        ...

    @property
    def budget(self) -> BudgetEntry:
        """What the door `latency-budget` is told."""
        ...

    @property
    def now_s(self) -> float: ...

    def enter(self, job: Job) -> None: ...

    def turn_out(self, job: Job, again_s: float) -> None:
        """Its client hears 503 and comes back to the door."""
        ...

    def call_in(self, seconds: float, callback: Callable[..., object], *given: object) -> None: ...


class Door(Protocol):
    def arrived(self, job: Job) -> None: ...

    def first_token(self, job_id: str) -> None: ...

    def ended(self, job_id: str) -> None: ...


@dataclass(slots=True)
class Open:
    """Everything goes in as it comes."""

    hall: Hall

    def arrived(self, job: Job) -> None:
        self.hall.enter(job)

    def first_token(self, job_id: str) -> None: ...

    def ended(self, job_id: str) -> None: ...


@dataclass(slots=True)
class PriorityClasses:
    """SMG's classes with their defaults: online is `interactive`, offline is `bulk`.

    A class may fill what the reservations of those above it leave. One that finds no slot preempts
    the newest offline request without a first byte, which is answered 503, and else it queues.
    """

    hall: Hall
    reserved_floor: int = 128
    reserved_share: float = 0.25
    above_reserved: int = 32
    """Of the class above both, `system`."""
    between_share: float = 0.10
    """Of the class between both, `default`."""
    queue_size: dict[Kind, int] = field(
        default_factory=lambda: {Kind.ONLINE: 256, Kind.OFFLINE: 1024}
    )
    inside: dict[str, Job] = field(default_factory=dict)
    silent: dict[str, Job] = field(default_factory=dict)
    """Offline ones that have not sent their first byte, in order of admission."""
    queues: dict[Kind, deque[Job]] = field(default_factory=lambda: {kind: deque() for kind in Kind})

    def arrived(self, job: Job) -> None:
        if self._admits(job.kind):
            self._let_in(job)
            return
        if job.kind is Kind.ONLINE and self.silent:
            self._preempt()
            if self._admits(job.kind):
                self._let_in(job)
                return
        queue = self.queues[job.kind]
        if len(queue) < self.queue_size[job.kind]:
            queue.append(job)
        else:
            self.hall.call_in(AGAIN_S, self.arrived, job)

    def first_token(self, job_id: str) -> None:
        self.silent.pop(job_id, None)

    def ended(self, job_id: str) -> None:
        self.silent.pop(job_id, None)
        if self.inside.pop(job_id, None) is not None:
            self._fill()

    def _fill(self) -> None:
        for kind in (Kind.ONLINE, Kind.OFFLINE):
            queue = self.queues[kind]
            while queue and self._admits(kind):
                self._let_in(queue.popleft())

    def _admits(self, kind: Kind) -> bool:
        slots = self.hall.slots
        online = sum(job.kind is Kind.ONLINE for job in self.inside.values())
        kept = self.above_reserved
        if kind is Kind.OFFLINE:
            reserved = max(self.reserved_floor, ceil(self.reserved_share * slots))
            kept += max(0, reserved - online) + ceil(self.between_share * slots)
        return len(self.inside) + kept < slots

    def _let_in(self, job: Job) -> None:
        self.inside[job.id] = job
        if job.kind is Kind.OFFLINE:
            self.silent[job.id] = job
        self.hall.enter(job)

    def _preempt(self) -> None:
        _, victim = self.silent.popitem()
        del self.inside[victim.id]
        self.hall.turn_out(victim, AGAIN_S)


@dataclass(slots=True)
class Aimd:
    """A batch processor that widens its window by one and halves it, once a second.

    It halves while online requests queue or KV use is above the high water mark, and widens while
    KV use is below the low one; between the two it stays.
    """

    hall: Hall
    window: int = 8
    high: float = 0.8
    low: float = 0.7
    inside: set[str] = field(default_factory=set)
    waiting: deque[Job] = field(default_factory=deque)
    ticks: bool = False

    def arrived(self, job: Job) -> None:
        if job.kind is Kind.ONLINE:
            self.hall.enter(job)
            return
        self.waiting.append(job)
        self._fill()
        if not self.ticks:
            self.ticks = True
            self.hall.call_in(1.0, self._adjust)

    def first_token(self, job_id: str) -> None: ...

    def ended(self, job_id: str) -> None:
        if job_id in self.inside:
            self.inside.remove(job_id)
            self._fill()

    def _fill(self) -> None:
        while self.waiting and len(self.inside) < self.window:
            job = self.waiting.popleft()
            self.inside.add(job.id)
            self.hall.enter(job)

    def _adjust(self) -> None:
        if self.hall.online_waiting or self.hall.kv_use > self.high:
            self.window = max(1, self.window // 2)
        elif self.hall.kv_use < self.low and len(self.inside) >= self.window:
            self.window += 1  # a window that is not full says nothing about a wider one
        self._fill()
        self.ticks = bool(self.inside or self.waiting)
        if self.ticks:
            self.hall.call_in(1.0, self._adjust)


DOORS: dict[str, Callable[[Hall], Door]] = {
    "open": Open,
    "priority-classes": PriorityClasses,
    "aimd": Aimd,
    "latency-budget": LatencyBudget,
}
