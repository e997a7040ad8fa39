"""From results to files: written as often as it takes, and kept once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from gateway.batch.faults import StoreFault
from gateway.batch.files import Blobs, Sink
from gateway.batch.lines import unanswered
from gateway.batch.objects import Batch, Purpose, Recorded, Status, StoredFile, Task
from gateway.batch.store import Store

_ROWS: Final = 100
_HOLD_US: Final = 60_000_000
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


class Draft:
    """A file that is being made; without a line there is none."""

    def __init__(self, store: Store, blobs: Blobs, blob: str, now_us: Callable[[], int]) -> None:
        self._store = store
        self._blobs = blobs
        self.blob = blob
        self._now_us = now_us
        self._sink: Sink | None = None
        self._held_us = 0
        self.size_bytes = 0
        self.lines = 0

    async def add(self, data: bytes, lines: int) -> None:
        sink = self._sink
        if sink is None:
            await self._store.announce(self.blob)
            self._held_us = self._now_us()
            sink = self._sink = await self._blobs.create(self.blob)
        elif self._now_us() - self._held_us > _HOLD_US:
            await self._store.hold(self.blob)
            self._held_us = self._now_us()
        await sink.write(data)
        self.size_bytes += len(data)
        self.lines += lines

    async def finish(self) -> bool:
        """False: there is nothing in it."""
        if self._sink is None:
            return False
        await self._sink.finish()
        return True

    async def close(self) -> None:
        """Lets go of it as it is."""
        if self._sink is not None:
            await self._sink.abandon()

    async def doom(self) -> None:
        """Litter, unless a file was made of it after all: a commit may fail to be heard of."""
        if self._held_us:
            await self._store.doom([self.blob])


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
        files = [
            _file(task.batch, draft, new_id("file-"), now_us()) if await draft.finish() else None
            for draft in drafts
        ]
        return await store.conclude(task, output=files[0], errors=files[1])
    except BaseException:
        for draft in drafts:
            await draft.close()
        with suppress(StoreFault):  # they are litter once nobody has held them for a while
            for draft in drafts:
                await draft.doom()
        raise


def _file(batch: Batch, draft: Draft, file_id: str, now_us: int) -> StoredFile:
    expires_s = batch.output_expires_s
    return StoredFile(
        id=file_id,
        tenant=batch.tenant,
        name=f"{batch.id}.jsonl",
        purpose=Purpose.OUTPUT,
        size_bytes=draft.size_bytes,
        lines=draft.lines,
        blob=draft.blob,
        created_us=now_us,
        expires_us=None if expires_s is None else now_us + expires_s * 1_000_000,
    )


async def _write(store: Store, task: Task, drafts: Sequence[Draft]) -> None:
    """Rows come by number, so that the files have the order of the input."""
    after = 0
    while rows := await store.recorded(task, after=after, limit=_ROWS):
        after = rows[-1].number
        for is_error, draft in enumerate(drafts):
            lines = [_line(task.batch, row) for row in rows if row.failed == bool(is_error)]
            if lines:
                await draft.add(b"\n".join(lines) + b"\n", len(lines))


def _line(batch: Batch, row: Recorded) -> bytes:
    if row.line is not None:
        return row.line
    code, message = _ENDS.get(batch.ends_as or Status.EXPIRED, _ENDS[Status.EXPIRED])
    return unanswered(batch.id, row.number, row.custom_id, code=code, message=message)
