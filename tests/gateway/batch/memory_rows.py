"""Rows in memory, for gateways on a virtual clock: the part of the store that a runner talks to.

Several owners share one `Ledger`, as gateways share a database. `trouble` is raised by every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from gateway.batch.faults import LeaseLost
from gateway.batch.objects import Batch, Result, Row, RowState, Status


@dataclass
class Entry:
    row: Row
    body: bytes
    state: RowState = RowState.QUEUED
    owner: str = ""
    not_before_us: int = 0
    result: Result | None = None


@dataclass
class Ledger:
    now_us: Callable[[], int]
    lease_us: int = 10**12
    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    until_us: dict[str, int] = field(default_factory=dict)
    wasted_tokens: int = 0
    over: set[int] = field(default_factory=set)
    """Batches that are cancelled."""
    marks: list[tuple[tuple[int, int], int]] = field(default_factory=list)
    releases: list[tuple[tuple[int, int], int, bool]] = field(default_factory=list)

    def add(self, endpoint: str, bodies: Sequence[bytes], *, within_s: float = 3600.0) -> int:
        batch = len({number for number, _ in self.entries}) + 1
        now_us = self.now_us()
        for number, body in enumerate(bodies, 1):
            row = Row(
                batch=batch,
                batch_id=f"batch_{batch}",
                tenant="acme",
                endpoint=endpoint,
                number=number,
                custom_id=f"row-{number}",
                blob="",
                offset=0,
                length=len(body),
                fence=0,
                attempts=0,
                deadline_us=now_us + round(within_s * 1e6),
            )
            self.entries[row.key] = Entry(row, body)
        return batch

    def results(self) -> list[Result]:
        return [entry.result for entry in self.entries.values() if entry.result is not None]

    def states(self) -> list[str]:
        return [entry.state.name for entry in self.entries.values()]

    @property
    def is_done(self) -> bool:
        return all(entry.state is RowState.DONE for entry in self.entries.values())


class MemoryRows:
    """One owner's view."""

    def __init__(self, ledger: Ledger, owner: str = "one") -> None:
        self.ledger = ledger
        self.owner = owner
        self.trouble: Exception | None = None
        self.claims: list[int] = []

    def _check(self) -> None:
        if self.trouble is not None:
            raise self.trouble
        if self.ledger.until_us.get(self.owner, 0) < self.ledger.now_us():
            raise LeaseLost("too late")

    def _holds(self, row: Row) -> Entry | None:
        entry = self.ledger.entries[row.key]
        mine = entry.state is RowState.CLAIMED and entry.owner == self.owner
        return entry if mine and entry.row.fence == row.fence else None

    async def join(self) -> None:
        if self.trouble is not None:
            raise self.trouble
        await self.reap()
        self.ledger.until_us[self.owner] = self.ledger.now_us() + self.ledger.lease_us

    def _free(self, owner: str) -> None:
        for entry in self.ledger.entries.values():
            if entry.owner == owner and entry.state is RowState.CLAIMED:
                entry.state = RowState.QUEUED

    async def reap(self) -> int:
        for owner, until_us in self.ledger.until_us.items():
            if until_us < self.ledger.now_us():
                self._free(owner)
        return 0

    async def claim(self, room: int) -> list[Row]:
        self._check()
        await self.reap()
        now_us, rows = self.ledger.now_us(), list[Row]()
        for entry in self.ledger.entries.values():
            free = entry.state is RowState.QUEUED and entry.not_before_us <= now_us
            if free and len(rows) < room and entry.row.batch not in self.ledger.over:
                entry.state, entry.owner = RowState.CLAIMED, self.owner
                entry.row = replace(entry.row, fence=entry.row.fence + 1)
                rows.append(entry.row)
        self.claims.append(len(rows))
        return rows

    async def bodies(self, rows: Sequence[Row]) -> list[bytes]:
        return [self.ledger.entries[row.key].body for row in rows]

    async def overdue(self, rows: Iterable[Row]) -> list[Row]:
        self._check()
        now_us, over = self.ledger.now_us(), self.ledger.over
        return [row for row in rows if row.batch in over or row.deadline_us <= now_us]

    async def checkpoint(self, marks: Sequence[tuple[Row, bytes, int]]) -> None:
        self._check()
        for row, taken, tokens in marks:
            if (entry := self._holds(row)) is not None:
                entry.row = replace(entry.row, checkpoint=taken, checkpoint_tokens=tokens)
                self.ledger.marks.append((row.key, tokens))

    async def finish(self, results: Sequence[Result]) -> list[Result]:
        self._check()
        accepted = []
        for result in results:
            if (entry := self._holds(result.row)) is not None:
                entry.state, entry.result = RowState.DONE, result
                accepted.append(result)
        return accepted

    async def release(
        self, rows: Sequence[Row], *, not_before_us: int = 0, blameless: bool = False
    ) -> int:
        self._check()
        released = 0
        for row in rows:
            if (entry := self._holds(row)) is not None:
                entry.state, entry.not_before_us = RowState.QUEUED, not_before_us
                attempts = entry.row.attempts + (not blameless)
                entry.row = replace(entry.row, attempts=attempts)
                self.ledger.releases.append((row.key, not_before_us, blameless))
                released += 1
        return released

    async def keep_only(self, rows: Iterable[Row]) -> int:
        self._check()
        known = {(row.key, row.fence) for row in rows}
        for entry in self.ledger.entries.values():
            mine = entry.state is RowState.CLAIMED and entry.owner == self.owner
            if mine and (entry.row.key, entry.row.fence) not in known:
                entry.state = RowState.QUEUED
        return 0

    async def open_batches(self) -> list[Batch]:
        left = [e.row for e in self.ledger.entries.values() if e.state is not RowState.DONE]
        return [_batch_of(row) for row in {row.batch: row for row in left}.values()]

    async def waste(self, batch: int, tokens: int) -> None:
        self._check()
        self.ledger.wasted_tokens += tokens


def _batch_of(row: Row) -> Batch:
    return Batch(
        seq=row.batch,
        id=row.batch_id,
        tenant=row.tenant,
        endpoint=row.endpoint,
        window="1h",
        input_file_id="",
        input_blob="",
        status=Status.IN_PROGRESS,
        created_us=0,
        deadline_us=row.deadline_us,
    )
