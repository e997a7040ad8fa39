"""How much the store is told at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gateway.batch.objects import Result
from gateway.batch.outbox import Outbox
from gateway.batch.tally import Tally
from tests.gateway.batch.memory_rows import Ledger, MemoryRows
from tests.gateway.batch.stored import a_row


class Slices(MemoryRows):
    def __init__(self) -> None:
        super().__init__(Ledger(lambda: 0))
        self.told: list[int] = []

    async def finish(self, results: Sequence[Result]) -> list[Result]:
        self.told.append(len(results))
        return list(results)


async def told(sizes: Sequence[int]) -> list[int]:
    store = Slices()
    outbox = Outbox(store, Tally(), lambda: 0, lambda row: None)
    row = a_row(blob="", number=0, place=(0, 1))
    for number, size in enumerate(sizes):
        result = Result(row=replace(row, number=number), failed=False, line=bytes(size))
        outbox.add(result.row, result)
    await outbox.flush()
    return store.told


async def test_results_are_recorded_so_many_bytes_at_a_time() -> None:
    mib = 2**20
    assert await told([mib] * 9) == [4, 4, 1]
    assert await told([1, 9 * mib, 9 * mib, 1, 1]) == [1, 1, 1, 2]


async def test_short_results_are_recorded_so_many_rows_at_a_time() -> None:
    assert await told([10] * 130) == [64, 64, 2]
