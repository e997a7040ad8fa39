"""From one status of a batch to the next: every move is one of `TRANSITIONS`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch.faults import NotThere, WrongStatus
from gateway.batch.objects import TRANSITIONS, Batch, Stage, Status
from gateway.batch.records import batch_of, text_of
from gateway.batch.tables import BATCHES


async def locked(connection: AsyncConnection, tenant: str, batch_id: str) -> Batch:
    """Until this transaction ends nobody else changes it."""
    found = await connection.execute(
        select(BATCHES)
        .where(BATCHES.c.tenant == tenant, BATCHES.c.id == batch_id)
        .with_for_update()
    )
    if (row := found.mappings().one_or_none()) is None:
        raise NotThere(f"there is no batch {batch_id}")
    return batch_of(row)


async def move(
    connection: AsyncConnection, batch: Batch, status: Status, now_us: int, **more: Any
) -> Batch:
    """`batch` is as this transaction has locked it."""
    if status not in TRANSITIONS[batch.status]:
        raise WrongStatus(f"the batch is {batch.status}")
    moments = batch.moments_us | {status: now_us}
    found = await connection.execute(
        update(BATCHES)
        .where(BATCHES.c.seq == batch.seq)
        .values(status=status.value, moments=text_of(moments), **more)
        .returning(*BATCHES.c)
    )
    return batch_of(found.mappings().one())


async def finalize(
    connection: AsyncConnection, batch: Batch, ends_as: Status, now_us: int
) -> Batch:
    values = {"ends_as": ends_as.value, "stage": Stage.FINALIZE.value}
    return await move(connection, batch, Status.FINALIZING, now_us, **values)


async def cancel(connection: AsyncConnection, tenant: str, batch_id: str, now_us: int) -> Batch:
    """Whoever validates it is fenced off; rows that run may still end, or come back."""
    batch = await locked(connection, tenant, batch_id)
    if batch.status is Status.CANCELLING:
        return batch
    return await move(
        connection,
        batch,
        Status.CANCELLING,
        now_us,
        ends_as=Status.CANCELLED.value,
        stage=Stage.FINALIZE.value,
        task_owner=None,
        task_fence=BATCHES.c.task_fence + 1,
    )


async def close_windows(connection: AsyncConnection, now_us: int) -> int:
    found = await connection.execute(
        select(BATCHES)
        .where(BATCHES.c.status == Status.IN_PROGRESS.value, BATCHES.c.deadline_us <= now_us)
        .order_by(BATCHES.c.seq)
        .with_for_update()
    )
    over = [batch_of(row) for row in found.mappings()]
    for batch in over:
        await finalize(connection, batch, Status.EXPIRED, now_us)
    return len(over)
