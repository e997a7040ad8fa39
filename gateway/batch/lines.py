"""The lines of output and error files, and the bodies of rows that are to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import orjson

from gateway.batch.files import Blobs
from gateway.batch.objects import Row

_AT_ONCE_BYTES: Final = 64 * 2**20


async def bodies(blobs: Blobs, rows: Sequence[Row]) -> list[bytes]:
    """The `body` of each row's line, as JSON, in the order of the rows."""
    by_blob: dict[str, list[Row]] = {}
    for row in rows:
        by_blob.setdefault(row.blob, []).append(row)
    found: dict[tuple[int, int], bytes] = {}
    for blob, of_blob in by_blob.items():
        for some in _slices(of_blob):
            ranges = [(row.offset, row.length) for row in some]
            lines = await blobs.read_many(blob, ranges)
            read = await blobs.beside_loop(_bodies_in, lines)
            found |= {row.key: body for row, body in zip(some, read, strict=True)}
    return [found[row.key] for row in rows]


def _slices(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Lines that are in memory together."""
    start, size_bytes = 0, 0
    for end, row in enumerate(rows):
        if size_bytes and size_bytes + row.length > _AT_ONCE_BYTES:
            yield rows[start:end]
            start, size_bytes = end, 0
        size_bytes += row.length
    if start < len(rows):
        yield rows[start:]


def _bodies_in(lines: Sequence[bytes]) -> list[bytes]:
    return [orjson.dumps(orjson.loads(line)["body"]) for line in lines]


def answered(row: Row, *, status: int, request_id: str, body: bytes) -> bytes:
    """The line of a row that a server, or the gateway in its place, has answered."""
    response = {"status_code": status, "request_id": request_id, "body": _json_in_a_line(body)}
    return _line(row.batch_id, row.number, row.custom_id, response, None)


def unanswered(batch_id: str, number: int, custom_id: str, *, code: str, message: str) -> bytes:
    """The line of a row without an answer, such as one that its window has ended for."""
    return _line(batch_id, number, custom_id, None, {"code": code, "message": message})


def _line(batch_id: str, number: int, custom_id: str, response: Any, error: Any) -> bytes:
    """Its id follows from the row, so that a line that is made again is the same."""
    fields = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{number}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return orjson.dumps(fields)


def _json_in_a_line(body: bytes) -> Any:
    """As it came wherever that goes: a server may break its lines, or not speak JSON at all."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")
    return value if b"\n" in body or b"\r" in body else orjson.Fragment(body)
