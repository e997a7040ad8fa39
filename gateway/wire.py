"""How an answer's bytes look: the head, the chunks, and what aiohttp is told afterwards.

aiohttp's responses build, sort and encode their headers anew each time. On the routes that
generate, that and its writer cost as much as everything else the gateway does to an answer.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus

from aiohttp import web

from policies.clock import Clock

LAST_CHUNK = b"0\r\n\r\n"
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n" for s in HTTPStatus}


class Sent(web.StreamResponse):
    """An answer that has gone out already: aiohttp only needs to know what follows it."""

    def __init__(self, *, keep_alive: bool) -> None:
        self._sent_keep_alive = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._sent_keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to do."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to do."""


class Dates:
    """The Date header, made once a second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s = 0.0
        self._line = ""

    def line(self) -> str:
        now_s = self._clock.time()
        if now_s >= self._until_s:
            self._until_s = now_s + 1.0
            self._line = f"date: {format_datetime(datetime.now(UTC), usegmt=True)}\r\n"
        return self._line


def head(status: int, lines: str) -> bytes:
    """`lines` are whole header lines, their values known to hold no line breaks."""
    start = _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"
    return f"{start}{lines}\r\n".encode("latin-1")
