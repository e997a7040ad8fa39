"""Which jobs of a queue have their keys computed anew now, where keys change as time passes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from policies.order import Key, Order, Outlook, remaining_tokens
from policies.queue import KeyedHeap
from policies.types import Job

Arrival = tuple[int, str]

TURN_JOBS: Final = 8
"""Keys computed anew at one look, besides those of the heads: the bound on its work."""
HEADS: Final = 4
"""Heads that may turn out to be no heads any more at one look."""
_BLOCK_JOBS: Final = 96
_BEFORE_ALL: Final[Arrival] = (-1, "")


class Arrivals:
    """Jobs in the order of their arrival, in blocks, with the tokens before each of them."""

    __slots__ = ("_blocks", "_firsts", "_tokens")

    def __init__(self) -> None:
        self._firsts: list[Arrival] = []
        self._blocks: list[tuple[list[Arrival], list[int]]] = []
        self._tokens: list[int] = []

    def add(self, arrival: Arrival, tokens: int) -> None:
        at = max(0, bisect_right(self._firsts, arrival) - 1)
        if not self._blocks:
            self._insert(0, [], [])
        arrivals, counts = self._blocks[at]
        place = bisect_left(arrivals, arrival)
        arrivals.insert(place, arrival)
        counts.insert(place, tokens)
        self._firsts[at] = arrivals[0]
        self._tokens[at] += tokens
        if len(arrivals) > _BLOCK_JOBS:
            # A queue grows at its end: what is full stays full.
            cut = _BLOCK_JOBS if at == len(self._blocks) - 1 else _BLOCK_JOBS // 2
            self._drop(at)
            self._insert(at, arrivals[cut:], counts[cut:])
            self._insert(at, arrivals[:cut], counts[:cut])

    def discard(self, arrival: Arrival) -> None:
        at = bisect_right(self._firsts, arrival) - 1
        arrivals, counts = self._blocks[at]
        place = bisect_left(arrivals, arrival)
        del arrivals[place]
        self._tokens[at] -= counts.pop(place)
        if arrivals:
            self._firsts[at] = arrivals[0]
        else:
            self._drop(at)

    def before(self, arrival: Arrival) -> int:
        """The tokens of those that came earlier."""
        at = bisect_right(self._firsts, arrival) - 1
        arrivals, counts = self._blocks[at]
        return sum(self._tokens[:at]) + sum(counts[: bisect_left(arrivals, arrival)])

    def after(self, arrival: Arrival, count: int) -> Iterator[tuple[Arrival, int]]:
        """Up to so many that came next, each with the tokens of those that came earlier."""
        at = max(0, bisect_right(self._firsts, arrival) - 1)
        if at == len(self._blocks):
            return iter(())
        arrivals, counts = self._blocks[at]
        place = bisect_right(arrivals, arrival)
        if place == len(arrivals) and at + 1 < len(self._blocks):
            at, place = at + 1, 0
            arrivals, counts = self._blocks[at]
        ahead = sum(self._tokens[:at]) + sum(counts[:place])
        end = place + count
        return zip(arrivals[place:end], accumulate(counts[place:end], initial=ahead), strict=False)

    def _insert(self, at: int, arrivals: list[Arrival], counts: list[int]) -> None:
        self._blocks.insert(at, (arrivals, counts))
        self._firsts.insert(at, arrivals[0] if arrivals else (0, ""))
        self._tokens.insert(at, sum(counts))

    def _drop(self, at: int) -> None:
        for column in (self._blocks, self._firsts, self._tokens):
            del column[at]


class Moving:
    """Keys that move, at a cost that does not grow with the queue.

    At each look the heads are seen to until one stays the head, and some of the others are, in
    turn. So a key is at most as old as it takes to see to all of them; in a queue no longer than
    that, every key is new at every look.
    """

    __slots__ = ("_arrivals", "_jobs", "_last", "_seen")

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._arrivals = Arrivals()
        self._last = _BEFORE_ALL
        self._seen: set[str] = set()
        """Those whose keys are of this look: what goes in its course changes them no more."""

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        self.discard(job)
        self._jobs[job.id] = job
        self._arrivals.add((job.arrival_us, job.id), remaining_tokens(job))

    def discard(self, job: Job) -> None:
        if (known := self._jobs.pop(job.id, None)) is not None:
            self._arrivals.discard((known.arrival_us, known.id))

    def turn(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> None:
        """The next ones have their keys computed anew; after the last comes the first."""
        self._seen.clear()
        left = min(TURN_JOBS, len(self._jobs))
        while left > 0:
            seen = self._see_to(left, heap, order, outlook)
            left -= seen
            if not seen:
                self._last = _BEFORE_ALL

    def _see_to(self, count: int, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> int:
        now_us, rate, servers, first_tokens = outlook
        jobs, seen, known = self._jobs, 0, self._seen
        for arrival, tokens in self._arrivals.after(self._last, count):
            self._last, job_id, seen = arrival, arrival[1], seen + 1
            known.add(job_id)
            key = order.key(jobs[job_id], Outlook(now_us, rate, servers, first_tokens + tokens))
            if not heap.has(job_id, key):
                heap.put(job_id, key)
        return seen

    def first(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> str | None:
        """The head, by keys of this moment."""
        for _ in range(HEADS):
            if (job_id := heap.peek()) is None or job_id in self._seen:
                return job_id
            self._seen.add(job_id)
            key = self.key(self._jobs[job_id], order, outlook)
            if heap.has(job_id, key):
                return job_id
            heap.put(job_id, key)
        return heap.peek()

    def key(self, job: Job, order: Order, outlook: Outlook) -> Key:
        tokens = self._arrivals.before((job.arrival_us, job.id))
        return order.key(job, outlook.behind(tokens))
