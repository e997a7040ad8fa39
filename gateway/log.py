"""How the gateway speaks: one JSON object a line, or a readable line on a terminal."""

from __future__ import annotations

import asyncio
import atexit
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, BinaryIO

import orjson
import structlog

from gateway.config import Log

_FLUSH_S = 0.05

WriteRequest = Callable[[dict[str, Any]], None]


class Lines:
    """A logger that writes its lines together, so that no request pays for a system call."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._lines: list[bytes] = []
        atexit.register(self.flush)

    def msg(self, line: bytes) -> None:
        self._lines.append(line)
        if len(self._lines) == 1:
            self._flush_soon()

    debug = info = warning = error = critical = exception = log = msg

    def _flush_soon(self) -> None:
        try:
            asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
        except RuntimeError:  # no loop is there to come round
            self.flush()

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._out.write(b"\n".join([*lines, b""]))
            self._out.flush()


def configure(settings: Log) -> WriteRequest:
    """Sets structlog up, and gives the way that lines about requests go.

    There are as many of those as requests: they take a short cut past structlog's processors.
    """
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    terminal = sys.stderr.isatty() if settings.format == "auto" else settings.format == "console"
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[Any] = [structlog.processors.add_log_level, stamp]
    wrapper = structlog.make_filtering_bound_logger(level)
    if terminal:
        structlog.configure(
            processors=[*shared, structlog.dev.ConsoleRenderer()],
            wrapper_class=wrapper,
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            cache_logger_on_first_use=True,
        )
        speak = structlog.get_logger("slackwater.request").info
        return lambda fields: speak(**fields)
    lines = Lines(sys.stderr.buffer)
    render = structlog.processors.JSONRenderer(serializer=orjson.dumps)
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, render],
        wrapper_class=wrapper,
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=True,
    )
    if level > logging.INFO:
        return lambda fields: None

    def write(fields: dict[str, Any]) -> None:
        fields["timestamp"] = datetime.now(UTC)
        lines.msg(orjson.dumps(fields, option=orjson.OPT_UTC_Z))

    return write
