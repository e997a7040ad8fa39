"""What tests put into a store, and how a batch is driven by hand."""

from __future__ import annotations

from itertools import count

from gateway.batch.objects import (
    Batch,
    NewBatch,
    NewRow,
    Purpose,
    Quota,
    Result,
    Row,
    Stage,
    StoredFile,
    Task,
)
from gateway.batch.store import Store

PLENTY = Quota(stored_bytes=10**12, open_batches=1_000, open_rows=10**9)
HOUR_US = 3_600_000_000

_numbers = count(1)


def new_file(
    tenant: str = "a",
    *,
    lines: int = 3,
    purpose: Purpose = Purpose.INPUT,
    size_bytes: int = 100,
    expires_us: int | None = None,
) -> StoredFile:
    number = next(_numbers)
    return StoredFile(
        id=f"file-{number}",
        tenant=tenant,
        name="rows.jsonl",
        purpose=purpose,
        size_bytes=size_bytes,
        lines=lines,
        blob=f"blob-{number}",
        created_us=number,
        expires_us=expires_us,
    )


def new_batch(file: StoredFile, *, window_us: int = 24 * HOUR_US) -> NewBatch:
    return NewBatch(
        id=f"batch_{next(_numbers)}",
        tenant=file.tenant,
        endpoint="/v1/chat/completions",
        window="24h",
        window_us=window_us,
        input_file_id=file.id,
        metadata={"who": "tests"},
    )


def new_rows(rows: int, start: int = 1) -> list[NewRow]:
    return [
        NewRow(number=n, custom_id=f"row-{n}", offset=100 * n, length=99, rank=n)
        for n in range(start, start + rows)
    ]


async def keep(store: Store, file: StoredFile, quota: Quota = PLENTY) -> StoredFile:
    await store.announce(file.blob)
    await store.add_file(file, quota)
    return file


async def submit(
    store: Store, tenant: str = "a", rows: int = 3, *, window_us: int = 24 * HOUR_US
) -> Batch:
    """A batch in validating."""
    file = await keep(store, new_file(tenant, lines=rows))
    return await store.add_batch(new_batch(file, window_us=window_us), PLENTY)


async def running(
    store: Store, tenant: str = "a", rows: int = 3, *, window_us: int = 24 * HOUR_US
) -> Batch:
    """A batch whose rows can be claimed."""
    await submit(store, tenant, rows, window_us=window_us)
    task = await taken(store, Stage.VALIDATE)
    await store.add_rows(task, new_rows(rows))
    return await store.begin(task, model="m", total=rows)


async def taken(store: Store, stage: Stage) -> Task:
    task = await store.take(stage)
    assert task is not None
    return task


def result(row: Row, *, failed: bool = False, tokens: int = 5) -> Result:
    line = b'{"custom_id":"%b"}' % row.custom_id.encode()
    return Result(row=row, failed=failed, line=line, prompt_tokens=7, generated_tokens=tokens)


async def conclude(store: Store, *, output: bool = True, errors: bool = False) -> Batch:
    """What finalising does, without bytes."""
    task = await taken(store, Stage.FINALIZE)
    files: list[StoredFile | None] = []
    for wanted in (output, errors):
        file = new_file(task.batch.tenant, purpose=Purpose.OUTPUT) if wanted else None
        if file is not None:
            await store.announce(file.blob)
        files.append(file)
    return await store.conclude(task, output=files[0], errors=files[1])


async def run_all(store: Store, room: int = 100) -> list[Row]:
    """Claims and finishes until nothing is left."""
    seen: list[Row] = []
    while rows := await store.claim(room):
        seen += rows
        await store.finish([result(row) for row in rows])
    return seen


def a_row(*, blob: str, number: int, place: tuple[int, int]) -> Row:
    """One that no store has."""
    return Row(
        batch=1,
        batch_id="batch_1",
        tenant="a",
        endpoint="/v1/chat/completions",
        number=number,
        custom_id=f"row-{number}",
        blob=blob,
        offset=place[0],
        length=place[1],
        fence=1,
        attempts=0,
        deadline_us=HOUR_US,
    )
