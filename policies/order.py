"""Which queued job goes next: a key, computed once when the job is queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from policies.types import Job

Key = tuple[int, ...]


class Order(Protocol):
    """Smaller keys go first; the queue breaks ties by id."""

    def key(self, job: Job) -> Key: ...


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served."""

    def key(self, job: Job) -> Key:
        return (job.arrival_us,)


@dataclass(frozen=True, slots=True)
class Edf:
    """Earliest deadline first: the most urgent prompt before the oldest one."""

    def key(self, job: Job) -> Key:
        return (job.deadline_us, job.arrival_us)
