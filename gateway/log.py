"""How the gateway speaks: one JSON object a line, or a readable line on a terminal."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import select
import sys
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from gateway.config import Log

_FLUSH_S = 0.05
_PIECE_BYTES = 4096
"""What a pipe that says it can be written to takes without blocking (PIPE_BUF)."""
_KEPT_BYTES = 1 << 20
"""Lines wait for whoever reads them in as much as this; those that come later are lost."""
_LAST_WORDS_MS = 500
LINES_WERE_LOST = "lines of this log were lost: it was not read fast enough"

WriteRequest = Callable[[dict[str, Any]], None]


class Lines:
    """A logger that writes its lines together, so that no request pays for a system call.

    A reader that stands still must not stop the gateway: what cannot be written without blocking
    waits, up to a limit, and what is beyond it is counted and told of when there is room again.
    """

    def __init__(self, out: int, kept_bytes: int = _KEPT_BYTES) -> None:
        self._poll = select.poll()
        self._poll.register(out, select.POLLOUT)
        self._out = out
        self._kept_bytes = self._room_bytes = kept_bytes
        self._waiting: deque[bytes] = deque()
        self._is_due = False
        self.lost = 0
        """Lines that nobody will read, and that nobody has been told of yet."""
        atexit.register(self.close)

    def msg(self, line: bytes) -> None:
        if len(line) >= self._room_bytes:
            self.lost += 1
            return
        self._room_bytes -= len(line) + 1
        self._waiting.append(line)
        if not self._is_due:
            self._flush_soon()

    debug = info = warning = error = critical = exception = log = msg

    def _flush_soon(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # none is there to come round
            self.flush(_LAST_WORDS_MS)
        else:
            loop.call_later(_FLUSH_S, self.flush)
            self._is_due = True

    def flush(self, wait_ms: int = 0) -> None:
        """Writes what goes without waiting longer than that; the rest is tried again soon."""
        self._is_due = False
        if self.lost and self._takes(wait_ms):
            self._waiting.append(_told_of(self.lost))
            self.lost = 0
        if not self._waiting:
            return
        left = b"\n".join([*self._waiting, b""])
        self._waiting.clear()
        self._room_bytes = self._kept_bytes
        while left and self._takes(wait_ms):
            try:
                left = left[os.write(self._out, left[:_PIECE_BYTES]) :]
            except OSError:  # nobody reads any more, and nobody can be told
                return
        if left:
            self._room_bytes -= len(left)
            self._waiting.append(left.removesuffix(b"\n"))
            if not wait_ms:
                self._flush_soon()

    def _takes(self, wait_ms: int) -> bool:
        return any(event & select.POLLOUT for _, event in self._poll.poll(wait_ms))

    def close(self) -> None:
        """Last words, for which the end does not wait long."""
        self.flush(_LAST_WORDS_MS)


def _told_of(lost: int) -> bytes:
    return orjson.dumps(
        {
            "event": LINES_WERE_LOST,
            "level": "warning",
            "lost": lost,
            "timestamp": datetime.now(UTC),
        },
        option=orjson.OPT_UTC_Z,
    )


class _Libraries(logging.Handler):
    """What libraries have to say goes the way of all lines."""

    def emit(self, record: logging.LogRecord) -> None:
        speak = structlog.get_logger(record.name)
        speak.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)


def configure(settings: Log) -> WriteRequest:
    """Sets structlog up, and gives the way that lines about requests go.

    There are as many of those as requests: they take a short cut past structlog's processors.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    terminal = sys.stderr.isatty() if settings.format == "auto" else settings.format == "console"
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[Any] = [structlog.processors.add_log_level, stamp]
    lines = Lines(sys.stderr.fileno())
    logging.getLogger().handlers = [_Libraries(logging.WARNING)]
    rendered: list[Any] = (
        [structlog.dev.ConsoleRenderer(), _encoded]
        if terminal
        else [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ]
    )
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=True,
    )
    if level > logging.INFO:
        return lambda fields: None
    if terminal:
        speak = structlog.get_logger("slackwater.request").info
        return lambda fields: speak(**fields)

    def write(fields: dict[str, Any]) -> None:
        fields["timestamp"] = datetime.now(UTC)
        lines.msg(orjson.dumps(fields, option=orjson.OPT_UTC_Z))

    return write


def _encoded(_: object, __: str, line: str) -> bytes:
    return line.encode(errors="backslashreplace")
