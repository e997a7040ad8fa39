"""The life of a row: claimed by one owner at a time, and finished once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import and_, delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch.counting import Sum, believed, count_back, count_claimed, count_results
from gateway.batch.moves import finalize
from gateway.batch.objects import Result, Row, RowState, Status
from gateway.batch.records import claimed_row
from gateway.batch.tables import BATCHES, CHECKPOINTS, RESULTS, ROWS
from gateway.batch.turns import Standing, deal

_QUEUED: Final = RowState.QUEUED.value
_CLAIMED: Final = RowState.CLAIMED.value
_DONE: Final = RowState.DONE.value

Mark = tuple[Row, bytes, int]


async def claim(connection: AsyncConnection, owner: str, room: int, now_us: int) -> list[Row]:
    """Rows that wait for their next attempt leave their batch's share to others."""
    standings = {one.seq: one for one in await _standings(connection, now_us)}
    claimed: list[Row] = []
    while dealt := deal(standings.values(), room - len(claimed), now_us):
        for batch, share in sorted(dealt.items()):
            rows = await _claim_of(connection, batch, owner, share, now_us)
            claimed += rows
            standing = standings[batch]
            standings[batch] = replace(
                standing,
                queued=0 if len(rows) < share else standing.queued - share,
                claimed=standing.claimed + len(rows),
            )
    return await _counted(connection, claimed, now_us)


async def _standings(connection: AsyncConnection, now_us: int) -> list[Standing]:
    batches = BATCHES.c
    queued = batches.total - batches.completed - batches.failed - batches.claimed
    found = await connection.execute(
        select(
            batches.seq, batches.tenant, queued.label("queued"), batches.claimed,
            batches.deadline_us,
        ).where(
            batches.status == Status.IN_PROGRESS.value, batches.deadline_us > now_us
        )
    )  # fmt: skip
    return [Standing(**one) for one in found.mappings()]


async def _claim_of(
    connection: AsyncConnection, batch: int, owner: str, share: int, now_us: int
) -> list[Row]:
    rows, batches, left = ROWS.c, BATCHES.c, CHECKPOINTS.c
    found = await connection.execute(
        select(
            ROWS, batches.id, batches.tenant, batches.endpoint, batches.input_blob,
            batches.deadline_us, left.data, left.tokens,
        )
        .join(BATCHES, batches.seq == rows.batch)
        .outerjoin(CHECKPOINTS, and_(left.batch == rows.batch, left.number == rows.number))
        .where(rows.batch == batch, rows.state == _QUEUED, rows.not_before_us <= now_us)
        .order_by(rows.rank)
        .limit(share)
        .with_for_update(skip_locked=True, of=ROWS)
    )  # fmt: skip
    claimed = [claimed_row(one) for one in found.mappings()]
    if claimed:
        await connection.execute(
            update(ROWS)
            .where(rows.batch == batch, rows.number.in_([row.number for row in claimed]))
            .values(state=_CLAIMED, owner=owner, fence=rows.fence + 1)
        )
    return claimed


async def _counted(connection: AsyncConnection, rows: Sequence[Row], now_us: int) -> list[Row]:
    """A batch that was cancelled a moment ago gets its rows back."""
    kept: list[Row] = []
    for batch, held in sorted(_by_batch(rows).items()):
        if await count_claimed(connection, batch, len(held), now_us):
            kept += held
        else:
            await _requeue(connection, batch, held)
    return kept


def _by_batch(rows: Iterable[Row]) -> dict[int, list[Row]]:
    batches: dict[int, list[Row]] = {}
    for row in rows:
        batches.setdefault(row.batch, []).append(row)
    return batches


async def _held(connection: AsyncConnection, owner: str, rows: Iterable[Row]) -> set[Row]:
    """Those that nobody has taken over; they stay so until the transaction ends."""
    held: set[Row] = set()
    for batch, asked in sorted(_by_batch(rows).items()):
        by_number = {row.number: row for row in asked}
        found = await connection.execute(
            select(ROWS.c.number, ROWS.c.fence)
            .where(
                ROWS.c.batch == batch,
                ROWS.c.number.in_(list(by_number)),
                ROWS.c.owner == owner,
                ROWS.c.state == _CLAIMED,
            )
            .order_by(ROWS.c.number)
            .with_for_update()
        )
        held |= {by_number[number] for number, fence in found if by_number[number].fence == fence}
    return held


async def overdue(connection: AsyncConnection, rows: Iterable[Row], now_us: int) -> list[Row]:
    by_batch = _by_batch(rows)
    over = await connection.scalars(
        select(BATCHES.c.seq).where(
            BATCHES.c.seq.in_(list(by_batch)),
            or_(BATCHES.c.status != Status.IN_PROGRESS.value, BATCHES.c.deadline_us <= now_us),
        )
    )
    return [row for batch in over for row in by_batch[batch]]


async def checkpoint(connection: AsyncConnection, owner: str, marks: Sequence[Mark]) -> None:
    held = await _held(connection, owner, [row for row, _, _ in marks])
    kept = {row.key: (row, data, tokens) for row, data, tokens in marks if row in held}
    if not kept:
        return
    await _drop_checkpoints(connection, [row for row, _, _ in kept.values()])
    await connection.execute(
        insert(CHECKPOINTS),
        [
            {"batch": row.batch, "number": row.number, "tokens": tokens, "data": data}
            for row, data, tokens in kept.values()
        ],
    )


async def _drop_checkpoints(connection: AsyncConnection, rows: Iterable[Row]) -> None:
    for batch, of_batch in _by_batch(rows).items():
        numbers = [row.number for row in of_batch]
        await connection.execute(
            delete(CHECKPOINTS).where(
                CHECKPOINTS.c.batch == batch, CHECKPOINTS.c.number.in_(numbers)
            )
        )


async def finish(
    connection: AsyncConnection, owner: str, results: Sequence[Result], now_us: int
) -> list[Result]:
    """A row's state, its result and the batch's counters change together."""
    held = await _held(connection, owner, [result.row for result in results])
    fresh = {result.row.key: result for result in reversed(results) if result.row in held}
    accepted: dict[int, list[Result]] = {}
    for batch, rows in sorted(_by_batch(one.row for one in fresh.values()).items()):
        await _set(connection, batch, rows, state=_DONE, owner=None)
        accepted[batch] = [fresh[row.key] for row in rows]
    for batch, of_batch in accepted.items():
        total = Sum()
        for result in of_batch:
            total.add(result)
        counted = await count_results(connection, batch, total, now_us)
        if counted is None:  # it is over: as if these rows had never been run
            of_batch.clear()
        elif not counted.counts.unfinished and counted.status is Status.IN_PROGRESS:
            await finalize(connection, counted, Status.COMPLETED, now_us)
    kept = {result.row.key for of_batch in accepted.values() for result in of_batch}
    recorded = [fresh[key] for key in kept]
    if recorded:
        await connection.execute(insert(RESULTS), [_result_values(one) for one in recorded])
        await _drop_checkpoints(connection, [one.row for one in recorded])
    return [result for result in results if fresh.get(result.row.key) is result
            and result.row.key in kept]  # fmt: skip


def _result_values(result: Result) -> dict[str, Any]:
    row = result.row
    return {
        "batch": row.batch, "number": row.number, "failed": result.failed, "line": result.line,
    }  # fmt: skip


async def release(
    connection: AsyncConnection,
    owner: str,
    rows: Sequence[Row],
    *,
    not_before_us: int,
    blameless: bool,
) -> int:
    held = _by_batch(await _held(connection, owner, rows))
    for batch, of_batch in sorted(held.items()):
        attempts = ROWS.c.attempts + (0 if blameless else 1)
        await _requeue(connection, batch, of_batch, attempts=attempts, not_before_us=not_before_us)
    await count_back(connection, {batch: len(of_batch) for batch, of_batch in held.items()})
    return sum(map(len, held.values()))


async def keep_only(
    connection: AsyncConnection, owner: str, known: Set[tuple[int, int, int]]
) -> int:
    """`known`: batch, number and fence."""
    rows = ROWS.c
    found = await connection.execute(
        select(rows.batch, rows.number, rows.fence)
        .where(rows.owner == owner, rows.state == _CLAIMED)
        .order_by(rows.batch, rows.number)
        .with_for_update()
    )
    strays: dict[int, list[int]] = {}
    for batch, number, fence in found:
        if (batch, number, fence) not in known:
            strays.setdefault(batch, []).append(number)
    for batch, numbers in strays.items():
        await connection.execute(
            update(ROWS)
            .where(rows.batch == batch, rows.number.in_(numbers))
            .values(state=_QUEUED, owner=None)
        )
    await count_back(connection, {batch: len(numbers) for batch, numbers in strays.items()})
    return sum(map(len, strays.values()))


async def _requeue(
    connection: AsyncConnection, batch: int, rows: Sequence[Row], **values: Any
) -> None:
    await _set(connection, batch, rows, state=_QUEUED, owner=None, **values)


async def _set(connection: AsyncConnection, batch: int, rows: Sequence[Row], **values: Any) -> None:
    numbers = [row.number for row in rows]
    await connection.execute(
        update(ROWS).where(ROWS.c.batch == batch, ROWS.c.number.in_(numbers)).values(**values)
    )


async def waste(connection: AsyncConnection, batch: int, tokens: int) -> None:
    await connection.execute(
        update(BATCHES)
        .where(BATCHES.c.seq == batch)
        .values(wasted_tokens=BATCHES.c.wasted_tokens + believed(tokens))
    )
