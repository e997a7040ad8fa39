"""Whose rows go next: tenants share alike, and a tenant's batches by the pressure of their windows.

The pressure of a batch is the rate at which it would have to run to end with its window. A tenant
chooses its windows, so that pressure decides among its own batches and not against other tenants.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_SOON_US: Final = 1_000_000
"""What is due sooner than this is as urgent as it gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A batch that has rows to run, or some that run: those are its tenant's share, too."""

    seq: int
    tenant: str
    queued: int
    claimed: int
    deadline_us: int

    def pressure(self, now_us: int) -> float:
        left_us = max(_SOON_US, self.deadline_us - now_us)
        return (self.queued + self.claimed) / left_us


def deal(standings: Iterable[Standing], room: int, now_us: int) -> dict[int, int]:
    """How many rows to take of each batch, so that what runs then is shared as it should be."""
    by_tenant: dict[str, list[Standing]] = {}
    for standing in standings:
        by_tenant.setdefault(standing.tenant, []).append(standing)
    hands = [_Hand(tenant, batches, now_us) for tenant, batches in by_tenant.items()]
    hands = [hand for hand in hands if not hand.is_empty]
    heapq.heapify(hands)
    dealt: dict[int, int] = {}
    for _ in range(room):
        if not hands:
            break
        hand = hands[0]
        seq = hand.take()
        dealt[seq] = dealt.get(seq, 0) + 1
        if hand.is_empty:
            heapq.heappop(hands)
        else:
            heapq.heapreplace(hands, hand)
    return dealt


class _Hand:
    """A tenant's batches: the next row is of the one that lags most behind its share."""

    __slots__ = ("_heap", "running", "tenant")

    def __init__(self, tenant: str, batches: list[Standing], now_us: int) -> None:
        self.tenant = tenant
        self.running = sum(batch.claimed for batch in batches)
        self._heap = [_Stack.of(batch, now_us) for batch in batches if batch.queued > 0]
        heapq.heapify(self._heap)

    def __lt__(self, other: _Hand) -> bool:
        return (self.running, self.tenant) < (other.running, other.tenant)

    @property
    def is_empty(self) -> bool:
        return not self._heap

    def take(self) -> int:
        stack = self._heap[0]
        self.running += 1
        stack.running += 1
        stack.queued -= 1
        if stack.queued:
            heapq.heapreplace(self._heap, stack)
        else:
            heapq.heappop(self._heap)
        return stack.seq


@dataclass(slots=True)
class _Stack:
    seq: int
    queued: int
    running: int
    pressure: float
    deadline_us: int

    @classmethod
    def of(cls, batch: Standing, now_us: int) -> _Stack:
        pressure = batch.pressure(now_us)
        return cls(batch.seq, batch.queued, batch.claimed, pressure, batch.deadline_us)

    def __lt__(self, other: _Stack) -> bool:
        return self._key < other._key

    @property
    def _key(self) -> tuple[float, int, int]:
        return (self.running + 1) / self.pressure, self.deadline_us, self.seq
