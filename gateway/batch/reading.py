"""What becomes of rows whose lines cannot be read: the others need not suffer for them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from backends.words import in_words
from gateway.batch.attempts import Later
from gateway.batch.faults import NotThere, StoreFault
from gateway.batch.objects import Row
from gateway.errors import Code

log = structlog.get_logger("slackwater.batch")

_UNREADABLE: Final = Later(code=Code.INTERNAL, message="its line cannot be read", is_engines=True)
_OUT_OF_REACH: Final = Later(code=Code.STORAGE_UNAVAILABLE, message="its file is out of reach")

Bodies = Callable[[Sequence[Row]], Awaitable[list[bytes]]]


async def read(bodies: Bodies, rows: Sequence[Row]) -> list[bytes | Later]:
    """In place of a line that cannot be read, why."""
    try:
        return list(await bodies(rows)) if rows else []
    except Exception as error:  # noqa: BLE001 - whatever a disk or a bucket may raise
        is_away = isinstance(error, StoreFault) and not isinstance(error, NotThere)
        apart = [row.blob if is_away else row.key for row in rows]
        if len(parts := dict.fromkeys(apart)) > 1:
            found: dict[tuple[int, int], bytes | Later] = {}
            for part in parts:
                some = [row for row, its in zip(rows, apart, strict=True) if its == part]
                told = await read(bodies, some)
                found |= {row.key: body for row, body in zip(some, told, strict=True)}
            return [found[row.key] for row in rows]
        where, why = rows[0], in_words(error)
        log.warning("a line cannot be read", batch=where.batch_id, line=where.number, error=why)
        return [_OUT_OF_REACH if is_away else _UNREADABLE] * len(rows)
