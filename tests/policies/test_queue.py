from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.queue import KeyedHeap

IDS = st.integers(0, 9).map(str)
KEYS = st.tuples(st.integers(0, 3), st.integers(0, 3))


class HeapMachine(RuleBasedStateMachine):
    """The heap beside a plain dict that is sorted whenever somebody asks."""

    def __init__(self) -> None:
        super().__init__()
        self.heap: KeyedHeap[tuple[int, ...]] = KeyedHeap()
        self.model: dict[str, tuple[int, ...]] = {}

    @rule(entry=IDS, key=KEYS)
    def put(self, entry: str, key: tuple[int, int]) -> None:
        self.heap.put(entry, key)
        self.model[entry] = key

    @rule(entry=IDS)
    def discard(self, entry: str) -> None:
        assert self.heap.discard(entry) is (self.model.pop(entry, None) is not None)

    @precondition(lambda self: self.model)
    @rule()
    def pop(self) -> None:
        first = self.in_order()[0]
        assert self.heap.pop() == first
        del self.model[first]

    def in_order(self) -> list[str]:
        return sorted(self.model, key=lambda entry: (self.model[entry], entry))

    @invariant()
    def it_is_the_sorted_model(self) -> None:
        assert list(self.heap) == self.in_order()
        assert len(self.heap) == len(self.model)
        assert self.heap.peek() == next(iter(self.in_order()), None)

    @invariant()
    def the_first_key_is_the_least(self) -> None:
        assert self.heap.first_key() == min(self.model.values(), default=None)


TestHeap = HeapMachine.TestCase


@given(st.lists(st.tuples(IDS, KEYS)))
def test_what_is_put_can_be_found(entries: list[tuple[str, tuple[int, int]]]) -> None:
    heap: KeyedHeap[tuple[int, ...]] = KeyedHeap()
    for entry, key in entries:
        heap.put(entry, key)
    assert all(entry in heap for entry, _ in entries)
    assert "nobody" not in heap


def test_entries_that_move_all_the_time_leave_no_heap_of_garbage() -> None:
    heap: KeyedHeap[tuple[int, ...]] = KeyedHeap()
    for i in range(10_000):
        heap.put(str(i % 3), (-i,))
    assert len(heap._heap) < 100
    assert list(heap) == ["0", "2", "1"]


def test_nothing_comes_out_of_an_empty_heap() -> None:
    with pytest.raises(IndexError):
        KeyedHeap[tuple[int, ...]]().pop()
