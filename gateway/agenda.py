"""What falls due when: a heap of deadlines for each purpose, and one alarm for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from policies.queue import KeyedHeap

Due = KeyedHeap[tuple[int, ...]]


class Agenda:
    """While the alarm lies ahead nothing is due, and nobody has to look at the heaps."""

    __slots__ = ("alarm_us", "give_up", "held", "later")

    def __init__(self) -> None:
        self.give_up: Due = KeyedHeap()
        """All jobs that wait, by when waiting is over for them."""
        self.later: Due = KeyedHeap()
        """Those of them that wait for their next attempt, by when it may come."""
        self.held: Due = KeyedHeap()
        """Queues whose first is held back for company, and jobs that are held until others can
        bear them, by when they go all the same."""
        self.alarm_us = 0
        """Never later than anything due; 0: something has changed, so it is not known."""

    def put(self, heap: Due, entry: str, due_us: int) -> None:
        heap.put(entry, (due_us,))
        self.mind(due_us)

    def mind(self, due_us: int) -> None:
        if due_us < self.alarm_us:
            self.alarm_us = 0

    def forget(self, job_id: str) -> None:
        self.later.discard(job_id)
        self.give_up.discard(job_id)
        self.held.discard(job_id)

    def next_alarm(self, others_us: Iterable[int]) -> int:
        due = [
            first[0]
            for heap in (self.later, self.give_up, self.held)
            if (first := heap.first_key()) is not None
        ]
        self.alarm_us = min([*due, *others_us])
        return self.alarm_us


def passed(heap: Due, now_us: int) -> Iterator[str]:
    """What is due, earliest first; each is taken off the heap."""
    while (first := heap.first_key()) is not None and first[0] <= now_us:
        yield heap.pop()
