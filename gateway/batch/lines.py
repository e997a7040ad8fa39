"""The lines of output and error files, and the bodies of rows that are to run."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from gateway.batch.objects import Row


async def bodies(blobs: object, rows: Sequence[Row]) -> list[bytes]:
    """The `body` of each row's line, as JSON; neighbours in a file are read together."""
    raise NotImplementedError


def answered(row: Row, *, status: int, request_id: str, body: bytes) -> bytes:
    """The line of a row that a server, or the gateway in its place, has answered."""
    return orjson.dumps(
        {
            "id": f"batch_req_{row.batch}_{row.number}",
            "custom_id": row.custom_id,
            "response": {
                "status_code": status,
                "request_id": request_id,
                "body": orjson.Fragment(body),
            },
            "error": None,
        }
    )


def unanswered(batch_id: str, number: int, custom_id: str, *, code: str, message: str) -> bytes:
    """The line of a row without an answer, such as one that its window has ended for."""
    raise NotImplementedError
