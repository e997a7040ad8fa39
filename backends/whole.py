"""A small answer that is told once all of it has come, or with what went wrong before that."""

from __future__ import annotations

from collections.abc import Callable

import orjson

from backends.http import HttpError

Ids = list[int]


class Whole:
    """Hears an answer, and keeps it until then."""

    __slots__ = ("_failed", "_pieces", "_status", "_told")

    def __init__(
        self, told: Callable[[int, bytes], None], failed: Callable[[HttpError], None]
    ) -> None:
        self._told = told
        self._failed = failed
        self._pieces: list[bytes] = []
        self._status = 0

    def on_head(self, status: int) -> None:
        self._status = status

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_end(self) -> None:
        self._told(self._status, b"".join(self._pieces))

    def on_error(self, error: HttpError) -> None:
        self._failed(error)


def ids_told(body: bytes) -> Ids | None:
    """What /v1/tokenize makes of a prompt."""
    try:
        tokens = orjson.loads(body)["tokens"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return tokens if type(tokens) is list and set(map(type, tokens)) <= {int} else None
