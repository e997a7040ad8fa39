"""Who holds what: files, batches and rows, each change of theirs one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Self

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch import claims, kept, leases, moves, stages
from gateway.batch.database import Database
from gateway.batch.faults import NotThere
from gateway.batch.kept import Order
from gateway.batch.objects import (
    OPEN,
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
from gateway.batch.records import batch_of
from gateway.batch.tables import BATCHES, TENANTS

_BLOB_US: Final = 300_000_000
"""For how long a blob that was announced, or held since, is somebody's business."""
_LINES_BYTES: Final = 4 * 2**20
"""In memory together, but for a line that is longer by itself."""
_FOREVER_US: Final = 2**62
_OPEN: Final = sorted(OPEN)


class Store:
    """The state of the Batch API in one database, shared by the gateways that use it.

    Times are microseconds since 1970, from `now_us`; hosts that share a database have to agree on
    them to a fraction of the lease. Every method is one transaction (those that say so: one for
    each slice) and raises a `StoreFault`, having changed nothing.
    """

    def __init__(
        self, database: Database, owner: str, now_us: Callable[[], int], lease_us: int
    ) -> None:
        self._database = database
        self._name = owner
        self._joined = 0
        self._owner = ""
        self._until_us = 0
        self._now_us = now_us
        self.lease_us = lease_us

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        owner: str,
        now_us: Callable[[], int],
        lease_us: int,
        alone: bool,
    ) -> Self:
        """Brings the tables up to date. `owner` is a name that nobody has had before. `alone`:
        nobody else can be using this database (a lock on its folder says so), thus whatever other
        owners held is free at once.
        """
        store = cls(await Database.open(url), owner, now_us, lease_us)
        try:
            if alone:
                await store._database.write(lambda tx: kept.doom(tx, None))
                await store._reap(_FOREVER_US)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Without giving anything back: see `leave`."""
        await self._database.close()

    def give_up(self) -> None:
        """What is under way fails now, wherever it hangs, and so does all that comes later."""
        self._database.give_up()

    # Leases. An owner's lease covers everything that it holds, so that one write renews it all.

    async def join(self) -> None:
        """Before the first claim, and again after LeaseLost, then as somebody new."""
        self._joined += 1
        owner, until_us = f"{self._name}.{self._joined}", self._now_us() + self.lease_us
        await self._database.write(lambda tx: leases.join(tx, owner, until_us), of_lease=True)
        self._owner, self._until_us = owner, until_us

    async def renew(self) -> None:
        """The heartbeat, a few times in each lease. LeaseLost: drop every row, then `join`."""
        owner, until_us = self._owner, self._now_us() + self.lease_us
        await self._database.write(lambda tx: leases.renew(tx, owner, until_us), of_lease=True)
        self._until_us = until_us

    @property
    def is_late(self) -> bool:
        """The lease may be over: the clock was set, or the machine stood still, since the last
        heartbeat."""
        return self._until_us < self._now_us() + self.lease_us // 2

    async def leave(self) -> None:
        """Gives back what is held: a shutdown need not wait for the lease to run out."""
        await self._database.write(lambda tx: leases.resign(tx, self._owner))
        await self._bury(self._owner, blameless=True)

    async def reap(self) -> int:
        """Frees what others held whose lease has run out; how many rows, in slices."""
        return await self._reap(self._now_us())

    async def _reap(self, before_us: int) -> int:
        late = await self._database.write(
            lambda tx: leases.declare_dead(tx, self._owner, before_us)
        )
        return sum([await self._bury(owner, blameless=False) for owner in late])

    async def _bury(self, owner: str, *, blameless: bool) -> int:
        freed, slice_of = 0, -1
        while slice_of:
            slice_of = await self._database.write(
                lambda tx: leases.free_rows(tx, owner, blameless=blameless)
            )
            freed += slice_of
        await self._database.write(lambda tx: leases.bury(tx, owner))
        return freed

    # Rows.

    async def claim(self, room: int) -> list[Row]:
        """Up to so many rows to run next: see turns.py for whose, by rank within a batch.

        Their bodies are not read: `lines.bodies(blobs, rows)` does that.
        """
        owner, now_us = self._owner, self._now_us()

        async def change(tx: AsyncConnection) -> list[Row]:
            await leases.check(tx, owner)
            return await claims.claim(tx, owner, room, now_us)

        return await self._database.write(change)

    async def overdue(self, rows: Iterable[Row]) -> list[Row]:
        """Of the rows held, those that nobody wants any more: cancelled or past their window."""
        async with self._database.reading() as connection:
            return await claims.overdue(connection, rows, self._now_us())

    async def checkpoint(self, marks: Sequence[claims.Mark]) -> None:
        """Keeps what was generated so far (bytes and tokens) for whoever claims the row next.

        Rows that are not held any more are passed over.
        """
        await self._database.write(lambda tx: claims.checkpoint(tx, self._owner, marks))

    async def finish(self, results: Sequence[Result]) -> list[Result]:
        """Records results, each exactly once; those that were accepted, in the order given.

        What is missing in the answer was fenced off: the row is another's, or its batch is over.
        """
        now_us = self._now_us()
        return await self._database.write(
            lambda tx: claims.finish(tx, self._owner, results, now_us)
        )

    async def release(
        self, rows: Sequence[Row], *, not_before_us: int = 0, blameless: bool = False
    ) -> int:
        """Back into the queue. `blameless`: nothing went wrong, it is not counted as an attempt."""
        return await self._database.write(
            lambda tx: claims.release(
                tx, self._owner, rows, not_before_us=not_before_us, blameless=blameless
            )
        )

    async def keep_only(self, rows: Iterable[Row]) -> int:
        """Frees what is claimed in this gateway's name but for these; how many. A claim that
        failed may have been committed nevertheless."""
        owner, known = self._owner, {(*row.key, row.fence) for row in rows}
        return await self._database.write(lambda tx: claims.keep_only(tx, owner, known))

    async def waste(self, batch: int, tokens: int) -> None:
        """Counts tokens that were generated in vain."""
        await self._database.write(lambda tx: claims.waste(tx, batch, tokens))

    # Batches.

    async def add_batch(self, new: NewBatch, quota: Quota) -> Batch:
        """In status validating. NotThere without its file, QuotaExceeded."""
        now_us = self._now_us()
        return await self._database.write(lambda tx: stages.add_batch(tx, new, quota, now_us))

    async def batch(self, tenant: str, batch_id: str) -> Batch:
        wanted = select(BATCHES).where(BATCHES.c.tenant == tenant, BATCHES.c.id == batch_id)
        async with self._database.reading() as connection:
            found = (await connection.execute(wanted)).mappings().one_or_none()
        if found is None:
            raise NotThere(f"there is no batch {batch_id}")
        return batch_of(found)

    async def batches(
        self, tenant: str, *, limit: int, after: str | None = None
    ) -> tuple[list[Batch], bool]:
        """Newest first, and whether there are more. NotThere when `after` is unknown."""
        wanted = [BATCHES.c.tenant == tenant]
        async with self._database.reading() as connection:
            return await kept.paged(
                connection, BATCHES, batch_of, tenant, wanted, limit, after, "desc"
            )

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Into cancelling; said twice it is the same. WrongStatus when it has ended."""
        now_us = self._now_us()
        return await self._database.write(lambda tx: moves.cancel(tx, tenant, batch_id, now_us))

    async def close_windows(self) -> int:
        """Batches past their window begin to be finalised; how many."""
        now_us = self._now_us()
        return await self._database.write(lambda tx: moves.close_windows(tx, now_us))

    async def open_batches(self) -> list[Batch]:
        """Of all tenants, for metrics."""
        found: list[Batch] = []
        async with self._database.reading() as connection:
            wanted = [BATCHES.c.status.in_(_OPEN)]
            async for some in kept.slices(connection, BATCHES, wanted, "asc"):
                found += map(batch_of, some)
        return found

    # Work on whole batches: see upkeep.py.

    async def take(self, stage: Stage) -> Task | None:
        """A batch that needs this work and has no other owner at it; None: there is none."""
        owner = self._owner

        async def change(tx: AsyncConnection) -> Task | None:
            await leases.check(tx, owner)
            return await stages.take(tx, owner, stage)

        return await self._database.write(change)

    async def drop_rows(self, task: Task, most: int) -> int:
        """Deletes up to so many rows and their results; how many."""
        return await self._database.write(lambda tx: stages.drop_rows(tx, self._owner, task, most))

    async def add_rows(self, task: Task, rows: Sequence[NewRow]) -> None:
        await self._database.write(lambda tx: stages.add_rows(tx, self._owner, task, rows))

    async def begin(self, task: Task, *, model: str, total: int) -> Batch:
        """All rows are there: the batch is in progress from now on."""
        now_us = self._now_us()
        return await self._database.write(
            lambda tx: stages.begin(tx, self._owner, task, model, total, now_us)
        )

    async def fail(self, task: Task, problems: Sequence[Problem]) -> Batch:
        now_us = self._now_us()
        return await self._database.write(
            lambda tx: stages.fail(tx, self._owner, task, problems, now_us)
        )

    async def recorded(
        self, task: Task, *, after: int, limit: int, most_bytes: int = _LINES_BYTES
    ) -> list[Recorded]:
        """Rows of the batch by number, from the one after `after`: at least one, and no more than
        have so many bytes of lines."""
        async with self._database.reading() as connection:
            return await stages.recorded(connection, task.batch, after, limit, most_bytes)

    async def conclude(
        self, task: Task, *, output: StoredFile | None, errors: StoredFile | None
    ) -> Batch:
        """The batch and its files are there in one step, or not at all."""
        now_us = self._now_us()
        return await self._database.write(
            lambda tx: stages.conclude(tx, self._owner, task, (output, errors), now_us)
        )

    async def purged(self, task: Task) -> None:
        await self._database.write(lambda tx: stages.purged(tx, self._owner, task))

    async def put_back(self, task: Task) -> None:
        """Work that failed here: somebody may take it again."""
        await self._database.write(lambda tx: stages.put_back(tx, self._owner, task))

    # Files, and the blobs that hold their bytes. A blob is announced before its first byte and
    # until a file is made of it, so that what a crash has left is known and swept up.

    async def announce(self, blob: str) -> None:
        until_us = self._now_us() + _BLOB_US
        await self._database.write(lambda tx: kept.announce(tx, blob, until_us))

    async def hold(self, blob: str) -> None:
        """To be said now and then while it is written. Fenced: it was swept up."""
        until_us = self._now_us() + _BLOB_US
        await self._database.write(lambda tx: kept.hold(tx, blob, until_us))

    async def doom(self, blobs: Sequence[str]) -> None:
        """No file will be made of them: they are litter from now on, unless they are files."""
        await self._database.write(lambda tx: kept.doom(tx, blobs))

    async def forget(self, blobs: Sequence[str]) -> None:
        """They are gone."""
        await self._database.write(lambda tx: kept.forget(tx, blobs))

    async def litter(self, limit: int, *, after: str = "") -> list[str]:
        """Blobs that belong to no file, by name: to be deleted, and then forgotten."""
        now_us = self._now_us()
        return await self._database.write(lambda tx: kept.litter(tx, now_us, limit, after))

    async def add_file(self, file: StoredFile, quota: Quota) -> None:
        """Its blob was announced and is complete. QuotaExceeded, Fenced."""
        await self._database.write(lambda tx: kept.add(tx, file, quota))

    async def file(self, tenant: str, file_id: str) -> StoredFile:
        async with self._database.reading() as connection:
            return await kept.get(connection, tenant, file_id, self._now_us())

    async def files(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        order: Order = "desc",
        purpose: Purpose | None = None,
    ) -> tuple[list[StoredFile], bool]:
        """NotThere when `after` is unknown."""
        async with self._database.reading() as connection:
            return await kept.page(
                connection,
                tenant,
                limit=limit,
                after=after,
                order=order,
                purpose=purpose,
                now_us=self._now_us(),
            )

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Its blob becomes litter. InUse while an open batch reads it."""
        await self._database.write(lambda tx: kept.remove(tx, tenant, file_id))

    async def expire_files(self) -> int:
        """Files past their time go, unless an open batch reads them; how many."""
        now_us = self._now_us()
        return await self._database.write(lambda tx: kept.expire(tx, now_us))

    async def holdings(self, tenant: str) -> Holdings:
        wanted = select(TENANTS).where(TENANTS.c.tenant == tenant)
        async with self._database.reading() as connection:
            found = (await connection.execute(wanted)).mappings().one_or_none()
        if found is None:
            return Holdings()
        return Holdings(**{key: value for key, value in found.items() if key != "tenant"})
