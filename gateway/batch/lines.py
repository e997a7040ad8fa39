"""The lines of output and error files, and the bodies of rows that are to run."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.batch.objects import Row


async def bodies(blobs: object, rows: Sequence[Row]) -> list[bytes]:
    """The `body` of each row's line, as JSON; neighbours in a file are read together."""
    raise NotImplementedError


def answered(row: Row, *, status: int, request_id: str, body: bytes) -> bytes:
    """The line of a row that a server, or the gateway in its place, has answered."""
    raise NotImplementedError


def unanswered(batch_id: str, number: int, custom_id: str, *, code: str, message: str) -> bytes:
    """The line of a row without an answer, such as one that its window has ended for."""
    raise NotImplementedError
