"""Who holds what: files, batches and rows, each change of theirs one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Self

from gateway.batch.objects import (
    Batch,
    Holdings,
    NewBatch,
    NewRow,
    Problem,
    Purpose,
    Quota,
    Recorded,
    Result,
    Row,
    Stage,
    StoredFile,
    Task,
)

Order = Literal["asc", "desc"]


class Store:
    """The state of the Batch API in one database, shared by the gateways that use it.

    Times are microseconds since 1970, from `now_us`. Every method is one transaction (those that
    say so: one for each slice) and raises a `StoreFault`, having changed nothing.
    """

    @classmethod
    async def open(
        cls, url: str, *, owner: str, now_us: Callable[[], int], lease_us: int, alone: bool
    ) -> Self:
        """Brings the tables up to date. `alone`: nobody else can be using this database (a lock
        on its folder says so), thus whatever other owners held is free at once.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Without giving anything back: see `leave`."""
        raise NotImplementedError

    # Leases. An owner's lease covers everything that it holds, so that one write renews it all.

    async def join(self) -> None:
        """Before the first claim, and again after LeaseLost."""
        raise NotImplementedError

    async def renew(self) -> None:
        """The heartbeat, a few times in each lease. LeaseLost: drop every row, then `join`."""
        raise NotImplementedError

    async def leave(self) -> None:
        """Gives back what is held: a shutdown need not wait for the lease to run out."""
        raise NotImplementedError

    async def reap(self) -> int:
        """Frees what owners held whose lease has run out; how many rows, in slices."""
        raise NotImplementedError

    # Rows.

    async def claim(self, room: int) -> list[Row]:
        """Up to so many rows to run next: see turns.py for whose, by rank within a batch.

        Their bodies are not read: `lines.bodies(blobs, rows)` does that.
        """
        raise NotImplementedError

    async def overdue(self, rows: Iterable[Row]) -> list[Row]:
        """Of the rows held, those that nobody wants any more: cancelled or past their window."""
        raise NotImplementedError

    async def checkpoint(self, marks: Sequence[tuple[Row, bytes, int]]) -> None:
        """Keeps what was generated so far (bytes and tokens) for whoever claims the row next.

        Rows that are not held any more are passed over.
        """
        raise NotImplementedError

    async def finish(self, results: Sequence[Result]) -> list[Result]:
        """Records results, each exactly once; those that were accepted, in the order given.

        What is missing in the answer was fenced off: the row is another's, or its batch is over.
        """
        raise NotImplementedError

    async def release(
        self, rows: Sequence[Row], *, not_before_us: int = 0, blameless: bool = False
    ) -> int:
        """Back into the queue. `blameless`: nothing went wrong, it is not counted as an attempt."""
        raise NotImplementedError

    async def waste(self, batch: int, tokens: int) -> None:
        """Counts tokens that were generated in vain."""
        raise NotImplementedError

    # Batches.

    async def add_batch(self, new: NewBatch, quota: Quota) -> Batch:
        """In status validating. NotThere without its file, QuotaExceeded."""
        raise NotImplementedError

    async def batch(self, tenant: str, batch_id: str) -> Batch:
        raise NotImplementedError

    async def batches(
        self, tenant: str, *, limit: int, after: str | None = None
    ) -> tuple[list[Batch], bool]:
        """Newest first, and whether there are more. NotThere when `after` is unknown."""
        raise NotImplementedError

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Into cancelling; said twice it is the same. WrongStatus when it has ended."""
        raise NotImplementedError

    async def close_windows(self) -> int:
        """Batches past their window begin to be finalised; how many."""
        raise NotImplementedError

    async def open_batches(self) -> list[Batch]:
        """Of all tenants, for metrics."""
        raise NotImplementedError

    # Work on whole batches: see upkeep.py.

    async def take(self, stage: Stage) -> Task | None:
        """The oldest batch that needs this work and has nobody at it; None: there is none."""
        raise NotImplementedError

    async def drop_rows(self, task: Task, most: int) -> int:
        """Deletes up to so many rows and their results; how many."""
        raise NotImplementedError

    async def add_rows(self, task: Task, rows: Sequence[NewRow]) -> None:
        raise NotImplementedError

    async def begin(self, task: Task, *, model: str, total: int) -> Batch:
        """All rows are there: the batch is in progress from now on."""
        raise NotImplementedError

    async def fail(self, task: Task, problems: Sequence[Problem]) -> Batch:
        raise NotImplementedError

    async def recorded(self, task: Task, *, after: int, limit: int) -> list[Recorded]:
        """Rows of the batch by number, from the one after `after`."""
        raise NotImplementedError

    async def conclude(
        self, task: Task, *, output: StoredFile | None, errors: StoredFile | None
    ) -> Batch:
        """The batch and its files are there in one step, or not at all."""
        raise NotImplementedError

    async def purged(self, task: Task) -> None:
        raise NotImplementedError

    async def put_back(self, task: Task) -> None:
        """Work that failed here: somebody may take it again."""
        raise NotImplementedError

    # Files, and the blobs that hold their bytes. A blob is announced before its first byte and
    # until a file is made of it, so that what a crash has left is known and swept up.

    async def announce(self, blob: str) -> None:
        """Said again, it holds for longer: a long upload does that now and then."""
        raise NotImplementedError

    async def forget(self, blobs: Sequence[str]) -> None:
        """They are gone."""
        raise NotImplementedError

    async def litter(self, limit: int) -> list[str]:
        """Blobs that belong to no file: to be deleted, and then forgotten."""
        raise NotImplementedError

    async def add_file(self, file: StoredFile, quota: Quota) -> None:
        """Its blob was announced and is complete. QuotaExceeded, Fenced."""
        raise NotImplementedError

    async def file(self, tenant: str, file_id: str) -> StoredFile:
        raise NotImplementedError

    async def files(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        order: Order = "desc",
        purpose: Purpose | None = None,
    ) -> tuple[list[StoredFile], bool]:
        raise NotImplementedError

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Its blob becomes litter. InUse while an open batch reads it."""
        raise NotImplementedError

    async def expire_files(self) -> int:
        """Files past their time go, unless an open batch reads them; how many."""
        raise NotImplementedError

    async def holdings(self, tenant: str) -> Holdings:
        raise NotImplementedError
