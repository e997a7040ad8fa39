"""A heap of ids under keys that are fixed when an entry goes in; any entry can be taken out."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, cast

K = TypeVar("K", bound="tuple[int, ...]")

Item = tuple[Any, ...]
"""A key's numbers and the id: what is flat is compared in one go."""


class KeyedHeap(Generic[K]):
    """`heapq` with lazy removal: O(log n) amortised, and the comparisons stay in C.

    Equal keys leave in the order of their ids, so that no order is left to chance.
    """

    __slots__ = ("_heap", "entries")

    def __init__(self) -> None:
        self._heap: list[Item] = []
        self.entries: dict[str, Item] = {}
        """All that wait, to be read only: whether there are any costs no call."""

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, entry: str) -> bool:
        return entry in self.entries

    def __iter__(self) -> Iterator[str]:
        """Every entry, in order; for reports, not for decisions."""
        return (item[-1] for item in sorted(self.entries.values()))

    def has(self, entry: str, key: K) -> bool:
        """Whether the entry waits under that very key."""
        return self.entries.get(entry) == (*key, entry)

    def put(self, entry: str, key: K) -> None:
        """Insert, or move to another key."""
        if not self.entries:
            # Keys of another order may be of another shape: what they left behind is not compared.
            self._heap.clear()
        self.entries[entry] = item = (*key, entry)
        heapq.heappush(self._heap, item)
        if len(self._heap) > 2 * len(self.entries) + 64:
            self._compact()

    def discard(self, entry: str) -> bool:
        return self.entries.pop(entry, None) is not None

    def peek(self) -> str | None:
        heap, entries = self._heap, self.entries
        while heap:
            item = heap[0]
            entry: str = item[-1]
            if entries.get(entry) is item:
                return entry
            heapq.heappop(heap)
        return None

    def first_key(self) -> K | None:
        entry = self.peek()
        return None if entry is None else cast(K, self.entries[entry][:-1])

    def first(self) -> Item:
        """The head's key and id; there has to be one."""
        if (entry := self.peek()) is None:
            raise IndexError("the first of an empty heap")
        return self.entries[entry]

    def pop(self) -> str:
        entry = self.peek()
        if entry is None:
            raise IndexError("pop from an empty heap")
        heapq.heappop(self._heap)
        del self.entries[entry]
        return entry

    def _compact(self) -> None:
        self._heap = list(self.entries.values())
        heapq.heapify(self._heap)
