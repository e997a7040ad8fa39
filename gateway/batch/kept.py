"""Files as they are kept: each is made of a blob that was announced, and leaves one behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Literal, TypeVar

from sqlalchemy import ColumnElement, RowMapping, Table, delete, insert, select, true, update
from sqlalchemy.engine import MappingResult
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch.counting import book
from gateway.batch.faults import Fenced, InUse, NotThere
from gateway.batch.objects import Holdings, Purpose, Quota, StoredFile
from gateway.batch.records import file_of, file_values
from gateway.batch.tables import BLOBS, FILES

Order = Literal["asc", "desc"]
T = TypeVar("T")

_DOOMED: Final = -1
_EXPIRE_AT_ONCE: Final = 100
_SLICE: Final = 200
_MANY: Final = 2**62


# Blobs.


async def announce(connection: AsyncConnection, blob: str, until_us: int) -> None:
    await connection.execute(insert(BLOBS).values(blob=blob, until_us=until_us))


async def hold(connection: AsyncConnection, blob: str, until_us: int) -> None:
    found = await connection.execute(
        update(BLOBS).where(BLOBS.c.blob == blob, BLOBS.c.until_us >= 0).values(until_us=until_us)
    )
    if not found.rowcount:
        raise Fenced("the blob took too long and was swept up")


async def litter(connection: AsyncConnection, now_us: int, limit: int, after: str) -> list[str]:
    """Doomed before their bytes go: no file can be made of them any more."""
    late = select(BLOBS.c.blob).where(BLOBS.c.until_us < now_us, BLOBS.c.blob > after)
    some = late.order_by(BLOBS.c.blob).limit(limit)
    found = list(await connection.scalars(some.with_for_update(skip_locked=True)))
    await connection.execute(update(BLOBS).where(BLOBS.c.blob.in_(found)).values(until_us=_DOOMED))
    return found


async def doom(connection: AsyncConnection, blobs: Sequence[str] | None) -> None:
    """Nobody will make files of these, or of any: whoever was at work on them is gone."""
    which = true() if blobs is None else BLOBS.c.blob.in_(blobs)
    await connection.execute(update(BLOBS).where(which).values(until_us=_DOOMED))


async def forget(connection: AsyncConnection, blobs: Sequence[str]) -> None:
    await connection.execute(delete(BLOBS).where(BLOBS.c.blob.in_(list(blobs))))


async def _drop(connection: AsyncConnection, files: Sequence[StoredFile]) -> None:
    await connection.execute(delete(FILES).where(FILES.c.id.in_([file.id for file in files])))
    for file in files:
        await announce(connection, file.blob, _DOOMED)
        await book(connection, file.tenant, Holdings(stored_bytes=-file.size_bytes))


# Files.


async def add(connection: AsyncConnection, file: StoredFile, quota: Quota | None) -> None:
    announced = await connection.execute(
        delete(BLOBS).where(BLOBS.c.blob == file.blob, BLOBS.c.until_us >= 0)
    )
    if not announced.rowcount:
        raise Fenced("the file took too long and was swept up")
    await connection.execute(insert(FILES).values(file_values(file)))
    await book(connection, file.tenant, Holdings(stored_bytes=file.size_bytes), quota)


async def get(connection: AsyncConnection, tenant: str, file_id: str, now_us: int) -> StoredFile:
    files = FILES.c
    found = await connection.execute(
        select(FILES).where(files.tenant == tenant, files.id == file_id, _lives(now_us))
    )
    return _only(found.mappings(), file_id)


async def page(
    connection: AsyncConnection,
    tenant: str,
    *,
    limit: int,
    after: str | None,
    order: Order,
    purpose: Purpose | None,
    now_us: int,
) -> tuple[list[StoredFile], bool]:
    wanted: list[ColumnElement[bool]] = [FILES.c.tenant == tenant, _lives(now_us)]
    if purpose is not None:
        wanted.append(FILES.c.purpose == purpose.value)
    return await paged(connection, FILES, file_of, tenant, wanted, limit, after, order)


async def paged(
    connection: AsyncConnection,
    table: Table,
    made: Callable[[RowMapping], T],
    tenant: str,
    wanted: Sequence[ColumnElement[bool]],
    limit: int,
    after: str | None,
    order: Order,
) -> tuple[list[T], bool]:
    """One more than asked for says whether there are more."""
    start = None
    if after is not None:
        start = await connection.scalar(
            select(table.c.seq).where(table.c.tenant == tenant, table.c.id == after)
        )
        if start is None:
            raise NotThere(f"there is no {after} to go on after")
    found: list[T] = []
    async for some in slices(connection, table, wanted, order, start, limit + 1):
        found += map(made, some)
    return found[:limit], len(found) > limit


async def slices(
    connection: AsyncConnection,
    table: Table,
    wanted: Sequence[ColumnElement[bool]],
    order: Order,
    start: int | None = None,
    most: int = _MANY,
) -> AsyncIterator[Sequence[RowMapping]]:
    """By number, so few at a time that nobody else notices."""
    seq = table.c.seq
    rising = order == "asc"
    while most > 0:
        after = true() if start is None else seq > start if rising else seq < start
        found = await connection.execute(
            select(table)
            .where(*wanted, after)
            .order_by(seq if rising else seq.desc())
            .limit(min(most, _SLICE))
        )
        rows = found.mappings().all()
        yield rows
        if len(rows) < _SLICE:
            return
        most -= len(rows)
        start = rows[-1]["seq"]


async def remove(connection: AsyncConnection, tenant: str, file_id: str) -> None:
    found = await connection.execute(
        select(FILES).where(FILES.c.tenant == tenant, FILES.c.id == file_id).with_for_update()
    )
    rows = found.mappings().all()
    if rows and rows[0]["readers"] > 0:
        raise InUse(f"a batch that is open is made of {file_id}")
    await _drop(connection, [_only_of(rows, file_id)])


async def expire(connection: AsyncConnection, now_us: int) -> int:
    found = await connection.execute(
        select(FILES)
        .where(FILES.c.expires_us <= now_us, FILES.c.readers == 0)
        .limit(_EXPIRE_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    late = [file_of(row) for row in found.mappings()]
    if late:
        await _drop(connection, late)
    return len(late)


async def lend(connection: AsyncConnection, tenant: str, file_id: str, now_us: int) -> StoredFile:
    """To a batch: until it is given back the file stays."""
    files = FILES.c
    found = await connection.execute(
        update(FILES)
        .where(
            files.tenant == tenant,
            files.id == file_id,
            files.purpose == Purpose.INPUT.value,
            _lives(now_us),
        )
        .values(readers=files.readers + 1)
        .returning(*files)
    )
    return _only(found.mappings(), file_id)


async def give_back(connection: AsyncConnection, file_id: str) -> None:
    await connection.execute(
        update(FILES).where(FILES.c.id == file_id).values(readers=FILES.c.readers - 1)
    )


def _lives(now_us: int) -> ColumnElement[bool]:
    """A file past its time is gone for everybody, whenever it is swept up."""
    return FILES.c.expires_us.is_(None) | (FILES.c.expires_us > now_us)


def _only(found: MappingResult, file_id: str) -> StoredFile:
    return _only_of(found.all(), file_id)


def _only_of(rows: Sequence[Any], file_id: str) -> StoredFile:
    if not rows:
        raise NotThere(f"there is no file {file_id}")
    return file_of(rows[0])
