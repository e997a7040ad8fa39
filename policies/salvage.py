"""Those that can still be in time first: the rule of Kairos repaired, and how its keys are kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Final

from policies.moving import HEADS, TURN_JOBS
from policies.order import NO_OUTLOOK, Key, Order, Outlook, remaining_tokens, target_us
from policies.queue import KeyedHeap
from policies.types import Job

GUARD_TARGETS: Final = 5
LOOK_JOBS: Final = TURN_JOBS + HEADS
"""Keys computed anew at one look: `TURN_JOBS` of those that may rise, the others of the first."""
_IN_TIME, _DOOMED = 0, 1


def guarded_us(job: Job) -> int:
    """When it has waited for so many targets that it competes by its length again."""
    return job.arrival_us + GUARD_TARGETS * target_us(job)


class Surfacing:
    """Keys of which nearly all stay, and hardly any falls.

    Within those in time and within the doomed the order never changes. Who becomes doomed is found
    out when it comes up first, and not before. A doomed one rises when its guard has come, which is
    known beforehand, or when the servers turn out to be faster while its deadline lies ahead:
    those few are seen to in turn.

    So the head is right, unless more than `LOOK_JOBS` have changed their place since the last look.
    """

    __slots__ = ("_guards", "_jobs", "_late", "_left")

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._guards: KeyedHeap[tuple[int]] = KeyedHeap()
        self._late: OrderedDict[str, None] = OrderedDict()
        self._left = LOOK_JOBS

    def add(self, job: Job) -> None:
        self.discard(job)
        self._jobs[job.id] = job

    def discard(self, job: Job) -> None:
        if self._jobs.pop(job.id, None) is not None:
            self._guards.discard(job.id)
            self._late.pop(job.id, None)

    def key(self, job: Job, order: Order, outlook: Outlook) -> Key:
        key = order.key(job, outlook)
        if key[0] == _DOOMED:
            if job.id not in self._guards.entries:
                self._guards.put(job.id, (guarded_us(job),))
            if job.deadline_us > outlook.now_us:
                self._late[job.id] = None
        return key

    def turn(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> None:
        """Those that may have risen."""
        seen, guards, late = 0, self._guards, self._late
        while seen < TURN_JOBS and (due := guards.first_key()) and due[0] < outlook.now_us:
            self._see_to(guards.pop(), heap, order, outlook)
            seen += 1
        for _ in range(min(TURN_JOBS - seen, len(late))):
            self._see_to(late.popitem(last=False)[0], heap, order, outlook)
            seen += 1
        self._left = LOOK_JOBS - seen

    def first(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> str | None:
        """The head, by keys of this moment."""
        for _ in range(max(1, self._left)):
            if (job_id := heap.peek()) is None:
                return None
            self._left -= 1
            if not self._see_to(job_id, heap, order, outlook):
                return job_id
        return heap.peek()

    def _see_to(self, job_id: str, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> bool:
        """Whether its key is another one now."""
        key = self.key(self._jobs[job_id], order, outlook)
        if heap.has(job_id, key):
            return False
        heap.put(job_id, key)
        return True


@dataclass(frozen=True, slots=True)
class Salvage:
    """Those that can still be in time before those that cannot; in both, the shortest first.

    A prompt is doomed when its own work alone misses the deadline. One that has waited for
    `GUARD_TARGETS` of its targets competes by its length again, as if it had just come.
    """

    moves: ClassVar[type[Surfacing]] = Surfacing

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        own_tokens = remaining_tokens(job)
        done_us = outlook.now_us + outlook.work_us(own_tokens)
        is_doomed = done_us > job.deadline_us and outlook.now_us <= guarded_us(job)
        return (_DOOMED if is_doomed else _IN_TIME, own_tokens, job.arrival_us)
