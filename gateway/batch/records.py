"""How a line of a table becomes a value, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import orjson
from sqlalchemy import RowMapping

from gateway.batch.objects import (
    Batch,
    Counts,
    NewRow,
    Problem,
    Purpose,
    Row,
    Status,
    StoredFile,
    Usage,
)

_FILE: Final = ("id", "tenant", "name", "size_bytes", "lines", "blob", "created_us", "expires_us")
_BATCH: Final = (
    "seq", "id", "tenant", "endpoint", "input_file_id", "input_blob", "created_us", "deadline_us",
    "model", "claimed", "output_expires_s", "output_file_id", "error_file_id", "recent_us",
    "recent_rows", "recent_tokens",
)  # fmt: skip
_ROW: Final = (
    "batch", "tenant", "endpoint", "number", "custom_id", "length", "attempts", "deadline_us",
)  # fmt: skip
_COUNTS: Final = ("total", "completed", "failed")
_USAGE: Final = ("prompt_tokens", "generated_tokens", "cached_tokens", "wasted_tokens")


def file_of(found: RowMapping) -> StoredFile:
    return StoredFile(purpose=Purpose(found["purpose"]), **_picked(found, _FILE))


def file_values(file: StoredFile) -> dict[str, Any]:
    return asdict(file) | {"purpose": file.purpose.value}


def batch_of(found: RowMapping) -> Batch:
    ends_as = found["ends_as"]
    return Batch(
        window=found["window_name"],
        status=Status(found["status"]),
        ends_as=None if ends_as is None else Status(ends_as),
        counts=Counts(**_picked(found, _COUNTS)),
        usage=Usage(**_picked(found, _USAGE)),
        metadata=orjson.loads(found["metadata"]),
        problems=tuple(Problem(**one) for one in orjson.loads(found["problems"])),
        moments_us=moments_of(found),
        **_picked(found, _BATCH),
    )


def moments_of(found: RowMapping) -> dict[Status, int]:
    return {Status(name): us for name, us in orjson.loads(found["moments"]).items()}


def text_of(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def claimed_row(found: RowMapping) -> Row:
    """With what is known of its batch and its checkpoint; it is claimed in this transaction."""
    return Row(
        batch_id=found["id"],
        blob=found["input_blob"],
        offset=found["start"],
        fence=found["fence"] + 1,
        checkpoint=found["data"] or b"",
        checkpoint_tokens=found["tokens"] or 0,
        **_picked(found, _ROW),
    )


def row_values(batch: int, rows: Sequence[NewRow]) -> list[dict[str, Any]]:
    return [
        {
            "batch": batch,
            "number": row.number,
            "custom_id": row.custom_id,
            "start": row.offset,
            "length": row.length,
            "rank": row.rank,
        }
        for row in rows
    ]


def _picked(found: RowMapping, names: Sequence[str]) -> dict[str, Any]:
    return {name: found[name] for name in names}
