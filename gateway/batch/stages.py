"""Work on a whole batch: taken by one gateway at a time, and refused from all others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch import kept
from gateway.batch.counting import book
from gateway.batch.faults import Fenced
from gateway.batch.moves import move
from gateway.batch.objects import (
    Batch,
    Holdings,
    NewBatch,
    NewRow,
    Problem,
    Quota,
    Recorded,
    Stage,
    Status,
    StoredFile,
    Task,
)
from gateway.batch.records import batch_of, row_values, text_of
from gateway.batch.tables import BATCHES, CHECKPOINTS, RESULTS, ROWS

_FREE: Final[dict[str, Any]] = {"stage": None, "task_owner": None}


async def add_batch(connection: AsyncConnection, new: NewBatch, quota: Quota, now_us: int) -> Batch:
    file = await kept.lend(connection, new.tenant, new.input_file_id, now_us)
    await book(connection, new.tenant, Holdings(open_batches=1, open_rows=file.lines), quota)
    found = await connection.execute(
        insert(BATCHES)
        .values(
            id=new.id,
            tenant=new.tenant,
            endpoint=new.endpoint,
            window_name=new.window,
            input_file_id=file.id,
            input_blob=file.blob,
            status=Status.VALIDATING.value,
            stage=Stage.VALIDATE.value,
            created_us=now_us,
            deadline_us=now_us + new.window_us,
            booked_rows=file.lines,
            metadata=text_of(new.metadata),
            moments=text_of({Status.VALIDATING: now_us}),
            output_expires_s=new.output_expires_s,
        )
        .returning(*BATCHES.c)
    )
    return batch_of(found.mappings().one())


async def take(connection: AsyncConnection, owner: str, stage: Stage) -> Task | None:
    """Rows of a cancelled batch that still run come to an end, or back, before it does.

    What the owner has taken before is free for it: it does one thing of a stage at a time, and may
    have failed to put this back. Work that fails lets what was taken less often go before it.
    """
    batches = BATCHES.c
    free = or_(batches.task_owner.is_(None), batches.task_owner == owner)
    settled = or_(batches.status != Status.CANCELLING.value, batches.claimed == 0)
    found = await connection.execute(
        select(BATCHES)
        .where(batches.stage == stage.value, free, settled)
        .order_by(batches.task_fence, batches.seq)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if (row := found.mappings().one_or_none()) is None:
        return None
    fence = row["task_fence"] + 1
    await connection.execute(
        update(BATCHES).where(batches.seq == row["seq"]).values(task_owner=owner, task_fence=fence)
    )
    return Task(stage=stage, batch=batch_of(row), fence=fence)


async def still(connection: AsyncConnection, owner: str, task: Task) -> Batch:
    """The batch as it is now, for whoever still holds it; it stays so in this transaction."""
    batches = BATCHES.c
    found = await connection.execute(
        select(BATCHES)
        .where(
            batches.seq == task.batch.seq,
            batches.task_owner == owner,
            batches.task_fence == task.fence,
        )
        .with_for_update()
    )
    if (row := found.mappings().one_or_none()) is None:
        raise Fenced("somebody else is at this batch, or it was cancelled")
    return batch_of(row)


async def put_back(connection: AsyncConnection, owner: str, task: Task) -> None:
    batches = BATCHES.c
    await connection.execute(
        update(BATCHES)
        .where(batches.seq == task.batch.seq, batches.task_owner == owner)
        .where(batches.task_fence == task.fence)
        .values(task_owner=None)
    )


# Validating.


async def add_rows(
    connection: AsyncConnection, owner: str, task: Task, rows: Sequence[NewRow]
) -> None:
    await still(connection, owner, task)
    await connection.execute(insert(ROWS), row_values(task.batch.seq, rows))


async def drop_rows(connection: AsyncConnection, owner: str, task: Task, most: int) -> int:
    await still(connection, owner, task)
    batch = task.batch.seq
    first = await connection.scalars(
        select(ROWS.c.number).where(ROWS.c.batch == batch).order_by(ROWS.c.number).limit(most)
    )
    numbers = list(first)
    if not numbers:
        return 0
    for table in (ROWS, RESULTS, CHECKPOINTS):
        await connection.execute(
            delete(table).where(table.c.batch == batch, table.c.number <= numbers[-1])
        )
    return len(numbers)


async def begin(
    connection: AsyncConnection, owner: str, task: Task, model: str, total: int, now_us: int
) -> Batch:
    batch = await still(connection, owner, task)
    values = {"model": model, "total": total, "recent_us": now_us, **_FREE}
    return await move(connection, batch, Status.IN_PROGRESS, now_us, **values)


async def fail(
    connection: AsyncConnection, owner: str, task: Task, problems: Sequence[Problem], now_us: int
) -> Batch:
    batch = await still(connection, owner, task)
    await _settle(connection, batch)
    values = {
        "problems": text_of([asdict(one) for one in problems]),
        "stage": Stage.PURGE.value,
        "task_owner": None,
    }
    return await move(connection, batch, Status.FAILED, now_us, **values)


async def _settle(connection: AsyncConnection, batch: Batch) -> None:
    """It has ended: what it took of its tenant's quota, and its file, are free again."""
    booked = await connection.scalar(
        select(BATCHES.c.booked_rows).where(BATCHES.c.seq == batch.seq)
    )
    await kept.give_back(connection, batch.input_file_id)
    await book(connection, batch.tenant, Holdings(open_batches=-1, open_rows=-(booked or 0)))


# Finalising.


async def recorded(
    connection: AsyncConnection, batch: Batch, after: int, limit: int, most_bytes: int
) -> list[Recorded]:
    """Lines are as long as answers are, so that what is read is chosen by their lengths first."""
    if not batch.counts.total:  # cancelled before its rows were known
        return []
    of_row = and_(RESULTS.c.batch == ROWS.c.batch, RESULTS.c.number == ROWS.c.number)
    joined = ROWS.outerjoin(RESULTS, of_row)
    some = ROWS.c.batch == batch.seq
    lengths = await connection.execute(
        select(ROWS.c.number, func.coalesce(func.length(RESULTS.c.line), 0))
        .select_from(joined)
        .where(some, ROWS.c.number > after)
        .order_by(ROWS.c.number)
        .limit(limit)
    )
    last = _last_within([(row[0], row[1]) for row in lengths], most_bytes)
    found = await connection.execute(
        select(ROWS.c.number, ROWS.c.custom_id, RESULTS.c.failed, RESULTS.c.line)
        .select_from(joined)
        .where(some, ROWS.c.number > after, ROWS.c.number <= last)
        .order_by(ROWS.c.number)
    )
    return [
        Recorded(number=number, custom_id=custom_id, failed=failed is not False, line=line)
        for number, custom_id, failed, line in found
    ]


def _last_within(lengths: Iterable[tuple[int, int]], most_bytes: int) -> int:
    """The number of the last row, of those that have so many bytes together; of one at least."""
    last, total_bytes = 0, 0
    for number, length in lengths:
        total_bytes += length
        if last and total_bytes > most_bytes:
            break
        last = number
    return last


async def conclude(
    connection: AsyncConnection,
    owner: str,
    task: Task,
    files: tuple[StoredFile | None, StoredFile | None],
    now_us: int,
) -> Batch:
    """What never finished is counted as failed: its line is in the file of errors."""
    batch = await still(connection, owner, task)
    for file in files:
        if file is not None:
            await kept.add(connection, file, None)
    await _settle(connection, batch)
    output, errors = files
    return await move(
        connection,
        batch,
        batch.ends_as or Status.COMPLETED,
        now_us,
        claimed=0,
        failed=batch.counts.total - batch.counts.completed,
        output_file_id=None if output is None else output.id,
        error_file_id=None if errors is None else errors.id,
        stage=Stage.PURGE.value,
        task_owner=None,
    )


async def purged(connection: AsyncConnection, owner: str, task: Task) -> None:
    await still(connection, owner, task)
    await connection.execute(update(BATCHES).where(BATCHES.c.seq == task.batch.seq).values(**_FREE))
