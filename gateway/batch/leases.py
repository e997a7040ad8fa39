"""Who is alive: one lease covers all that an owner holds, and what a dead one held is freed."""

from __future__ import annotations

from typing import Final

from sqlalchemy import and_, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch.counting import count_back
from gateway.batch.faults import LeaseLost
from gateway.batch.objects import RowState
from gateway.batch.tables import BATCHES, OWNERS, ROWS

_SLICE: Final = 500


async def join(connection: AsyncConnection, owner: str, until_us: int) -> None:
    await connection.execute(insert(OWNERS).values(owner=owner, until_us=until_us, dead=False))


async def renew(connection: AsyncConnection, owner: str, until_us: int) -> None:
    """Once declared dead it stays so: what it held may be another's by now."""
    found = await connection.execute(
        update(OWNERS).where(OWNERS.c.owner == owner, ~OWNERS.c.dead).values(until_us=until_us)
    )
    if not found.rowcount:
        raise LeaseLost("this gateway was silent for too long")


async def check(connection: AsyncConnection, owner: str) -> None:
    """Until this transaction ends nobody can declare the owner dead."""
    alive = await connection.scalar(
        select(OWNERS.c.owner)
        .where(OWNERS.c.owner == owner, ~OWNERS.c.dead)
        .with_for_update(read=True)
    )
    if alive is None:
        raise LeaseLost("this gateway was silent for too long")


async def declare_dead(connection: AsyncConnection, owner: str, before_us: int) -> list[str]:
    """All but the owner itself whose lease was to end before that; those who were dead already
    are among them."""
    late = and_(OWNERS.c.until_us < before_us, OWNERS.c.owner != owner)
    await connection.execute(update(OWNERS).where(late, ~OWNERS.c.dead).values(dead=True))
    dead = await connection.scalars(select(OWNERS.c.owner).where(OWNERS.c.dead))
    return sorted(dead)


async def resign(connection: AsyncConnection, owner: str) -> None:
    await connection.execute(update(OWNERS).where(OWNERS.c.owner == owner).values(dead=True))


async def free_rows(connection: AsyncConnection, owner: str, *, blameless: bool) -> int:
    """A slice of what a dead owner held; how many rows."""
    held = await connection.execute(
        select(ROWS.c.batch, ROWS.c.number)
        .where(ROWS.c.owner == owner)
        .order_by(ROWS.c.batch, ROWS.c.number)
        .limit(_SLICE)
        .with_for_update()
    )
    by_batch: dict[int, list[int]] = {}
    for batch, number in held:
        by_batch.setdefault(batch, []).append(number)
    for batch, numbers in by_batch.items():
        await connection.execute(
            update(ROWS)
            .where(ROWS.c.batch == batch, ROWS.c.number.in_(numbers))
            .values(
                state=RowState.QUEUED.value,
                owner=None,
                attempts=ROWS.c.attempts + (0 if blameless else 1),
            )
        )
    await count_back(connection, {batch: len(numbers) for batch, numbers in by_batch.items()})
    return sum(map(len, by_batch.values()))


async def bury(connection: AsyncConnection, owner: str) -> None:
    """Nothing is held under its name any more."""
    await connection.execute(
        update(BATCHES).where(BATCHES.c.task_owner == owner).values(task_owner=None)
    )
    await connection.execute(delete(OWNERS).where(OWNERS.c.owner == owner))
