"""From results to files: written as often as it takes, and kept once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from gateway.batch.drafts import Draft
from gateway.batch.faults import StoreFault
from gateway.batch.files import Blobs
from gateway.batch.lines import unanswered
from gateway.batch.objects import Batch, Purpose, Recorded, Status, StoredFile, Task
from gateway.batch.store import Store

_ROWS: Final = 100
_ENDS: Final = {
    Status.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    Status.CANCELLED: (
        "batch_cancelled",
        "This request was not executed: the batch was cancelled.",
    ),
}


async def finalize(
    store: Store,
    blobs: Blobs,
    task: Task,
    new_id: Callable[[str], str],
    now_us: Callable[[], int],
) -> Batch:
    """Two gateways that both believe that it is theirs write different blobs: one counts."""
    drafts = [Draft(store, blobs, new_id("blob_"), now_us) for _ in range(2)]
    try:
        await _write(store, task, drafts)
        await _keep_held(drafts)
        output, errors = [await _file(draft, task.batch, new_id("file-")) for draft in drafts]
        return await store.conclude(task, output=output, errors=errors)
    except BaseException:
        for draft in drafts:
            await draft.close()
        with suppress(StoreFault):  # they are litter once nobody has held them for a while
            for draft in drafts:
                await draft.doom()
        raise


async def _file(draft: Draft, batch: Batch, file_id: str) -> StoredFile | None:
    if not await draft.finish():
        return None
    name, expires_s = f"{batch.id}.jsonl", batch.output_expires_s
    return draft.as_file(file_id, batch.tenant, name, Purpose.OUTPUT, expires_s)


async def _write(store: Store, task: Task, drafts: Sequence[Draft]) -> None:
    """Rows come by number, so that the files have the order of the input."""
    after = 0
    while rows := await store.recorded(task, after=after, limit=_ROWS):
        after = rows[-1].number
        await _keep_held(drafts)
        for is_error, draft in enumerate(drafts):
            lines = [_line(task.batch, row) for row in rows if row.failed == bool(is_error)]
            if lines:
                await draft.add(b"\n".join([*lines, b""]), len(lines))


async def _keep_held(drafts: Sequence[Draft]) -> None:
    """The file of errors may get a line at the beginning, and none for long: it is wanted still."""
    for draft in drafts:
        await draft.keep_held()


def _line(batch: Batch, row: Recorded) -> bytes:
    if row.line is not None:
        return row.line
    code, message = _ENDS.get(batch.ends_as or Status.EXPIRED, _ENDS[Status.EXPIRED])
    return unanswered(batch.id, row.number, row.custom_id, code=code, message=message)
