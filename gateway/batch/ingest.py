"""From a file to rows: it is read, checked and stored in slices that nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from typing import Final

from gateway.batch.faults import NotThere
from gateway.batch.files import Blobs
from gateway.batch.objects import Batch, Problem, Task
from gateway.batch.store import Store
from gateway.batch.validate import Checker, Limits, reported

_PIECE_BYTES: Final = 65_536
_LINES: Final = 16
"""Checked at a time, in a thread that has the interpreter meanwhile: the event loop, which wakes up
several times for each token, waits for it each time."""
_LEAST_BYTES, _MOST_BYTES = 2_048, 32_768
_REST_S: Final = 0.0002
"""Then the event loop may have the interpreter."""
_ROWS: Final = 100
"""Stored in one transaction."""
_ROW_BYTES: Final = 1_000
"""To store a row keeps the event loop as long as so many bytes that pass."""
_DROPPED: Final = 1_000


async def ingest(store: Store, blobs: Blobs, task: Task, limits: Limits) -> Batch:
    """The batch in progress, or failed; whoever was at it before has left nothing that counts."""
    while await store.drop_rows(task, _DROPPED):
        pass
    checker = Checker(task.batch.endpoint, limits)
    try:
        await _check(blobs, task.batch.input_blob, checker)
    except NotThere:
        gone = Problem(code="file_not_found", message="the file's bytes are gone")
        return await store.fail(task, [gone])
    if checker.problems:
        return await store.fail(task, reported(checker.problems))
    rows = await blobs.off_loop(checker.rows)
    while slice_of := list(islice(rows, _ROWS)):
        await store.add_rows(task, slice_of)
        await blobs.let(len(slice_of) * _ROW_BYTES)
    return await store.begin(task, model=checker.model, total=checker.total)


async def _check(blobs: Blobs, blob: str, checker: Checker) -> None:
    never = threading.Event()

    def check(start: int) -> int:
        piece = blobs.shelf.read(blob, [(start, _PIECE_BYTES)])[0]
        for part in sliced(piece):
            checker.feed(part)
            never.wait(_REST_S)
        return len(piece)

    start = 0
    while read := await blobs.off_loop(check, start):
        start += read
        await blobs.let(read)
    await blobs.off_loop(checker.finish)


def sliced(piece: bytes) -> Iterator[bytes]:
    """Of a few lines each, as far as their average goes."""
    lines = max(1, piece.count(b"\n"))
    size_bytes = min(max(len(piece) * _LINES // lines, _LEAST_BYTES), _MOST_BYTES)
    for start in range(0, len(piece), size_bytes):
        yield piece[start : start + size_bytes]
