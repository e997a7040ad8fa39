"""What rows have come to, until the store has it: results, and rows that go back to the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol, TypeVar

from gateway.batch.held import Mark
from gateway.batch.objects import Result, Row
from gateway.batch.tally import Tally
from gateway.batch.verdicts import Again

T = TypeVar("T")

_AT_ONCE: Final = 64
"""Rows in one transaction: more of them would be noticed by online requests."""
_BYTES_AT_ONCE: Final = 4 * 2**20
"""... and lines in one, but for a line that is longer by itself."""


class Told(Protocol):
    """What of the store is needed here; the store itself has the contracts."""

    async def checkpoint(self, marks: Sequence[tuple[Row, bytes, int]]) -> None: ...
    async def finish(self, results: Sequence[Result]) -> list[Result]: ...
    async def release(
        self, rows: Sequence[Row], *, not_before_us: int = 0, blameless: bool = False
    ) -> int: ...
    async def waste(self, batch: int, tokens: int) -> None: ...


class Outbox:
    """The store may be out of order for a while: what it could not be told is told again."""

    def __init__(
        self,
        store: Told,
        tally: Tally,
        unix_us: Callable[[], int],
        forget: Callable[[Row], object],
    ) -> None:
        """`forget` hears of each row that the store has taken."""
        self._store = store
        self._tally = tally
        self._unix_us = unix_us
        self._forget = forget
        self._results: list[Result] = []
        self._back: list[tuple[Row, Again]] = []

    def __len__(self) -> int:
        return len(self._results) + len(self._back)

    def finished(self) -> set[tuple[int, int]]:
        """Rows that have a result."""
        return {result.row.key for result in self._results}

    def add(self, row: Row, told: Result | Again) -> None:
        if isinstance(told, Result):
            self._results.append(told)
        else:
            self._back.append((row, told))

    def clear(self) -> None:
        """The rows are others' by now."""
        self._results, self._back = [], []

    async def flush(self) -> None:
        while self._results:
            some = _first(self._results)
            accepted = await self._store.finish(some)
            del self._results[: len(some)]
            await self._settle(some, accepted)
        while self._back:
            again = self._back[0][1]
            rows = [row for row, one in self._back if one == again]
            await self.release(rows, again)
            told = {id(row) for row in rows}  # others of the kind may have come meanwhile
            self._back = [(row, one) for row, one in self._back if id(row) not in told]
            for row in rows:
                self._forget(row)

    async def release(self, rows: Sequence[Row], again: Again) -> None:
        not_before_us = self._unix_us() + again.pause_us if again.pause_us else 0
        for some in _slices(rows):
            await self._store.release(some, not_before_us=not_before_us, blameless=again.blameless)

    async def keep(self, marks: Sequence[Mark]) -> None:
        """Checkpoints of rows under way."""
        for some in _slices(marks):
            await self._store.checkpoint(
                [(held.row, taken.as_bytes(), taken.tokens) for held, taken in some]
            )
            for held, taken in some:
                held.kept_tokens = taken.tokens
            self._tally.checkpoints += len(some)

    async def waste(self, wasted: Mapping[int, int]) -> None:
        """Tokens by batch."""
        for batch, tokens in wasted.items():
            await self._store.waste(batch, tokens)

    async def _settle(self, told: Iterable[Result], accepted: Iterable[Result]) -> None:
        taken = {result.row.key for result in accepted}
        wasted: Counter[int] = Counter()
        for result in told:
            if result.row.key in taken:
                self._tally.finished(result)
            else:
                self._tally.fenced += 1
                wasted[result.row.batch] += result.generated_tokens
            self._forget(result.row)
        await self.waste(wasted)


def _first(results: Sequence[Result]) -> Sequence[Result]:
    """As many as go into one transaction."""
    size_bytes = len(results[0].line)
    for count, result in enumerate(results[1:_AT_ONCE], 1):
        size_bytes += len(result.line)
        if size_bytes > _BYTES_AT_ONCE:
            return results[:count]
    return results[:_AT_ONCE]


def _slices(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]
