"""Where events begin and end in a server's stream, whose pieces may be cut anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

DONE: Final = b"data: [DONE]\n\n"
_LAST_EVENTS: Final = (
    b"event: message_stop\n",
    b"event: response.completed\n",
    b"event: response.failed\n",
    b"event: response.incomplete\n",
)


class Events:
    """Collects pieces and gives back whole events; what is torn waits for the next piece."""

    __slots__ = ("_torn",)

    def __init__(self) -> None:
        self._torn = b""

    def cut(self, piece: bytes) -> bytes:
        if self._torn:
            piece = self._torn + piece
        if piece.endswith(b"\n\n"):
            self._torn = b""
            return piece
        end = piece.rfind(b"\n\n") + 2
        if end == 1:
            self._torn = piece
            return b""
        self._torn = piece[end:]
        return piece[:end]


def split_events(events: bytes) -> list[bytes]:
    """Whole events, each with its blank line; what follows the last blank line is left out."""
    return [event + b"\n\n" for event in events.split(b"\n\n")[:-1] if event]


def payload(event: bytes) -> dict[str, Any] | None:
    """The JSON object an event carries; None for comments, [DONE] and what is not an object."""
    start = 0 if event.startswith(b"data: ") else event.find(b"\ndata: ") + 1
    if start == 0 and not event.startswith(b"data: "):
        return None
    try:
        value = orjson.loads(event[start + 6 :])
    except orjson.JSONDecodeError:
        return None
    return value if type(value) is dict else None


def payloads(events: bytes) -> Iterator[dict[str, Any]]:
    return (found for event in split_events(events) if (found := payload(event)) is not None)


def is_corrupt(events: bytes) -> bool:
    """Asked only of pieces that look odd: JSON is not parsed for each token."""
    return any(_is_unreadable(event) for event in split_events(events))


def _is_unreadable(event: bytes) -> bool:
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    if not data or data == b"[DONE]":
        return False
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return True
    return False


def as_event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def ends_stream(tail: bytes) -> bool:
    """True where the protocol says that nothing follows; a line break never stands inside JSON."""
    if tail.endswith(DONE):
        return True
    return b"event: " in tail and any(mark in tail for mark in _LAST_EVENTS)
