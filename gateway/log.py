"""How the gateway speaks: one JSON object a line, or a readable line on a terminal."""

from __future__ import annotations

import logging
import sys
from typing import Any

import orjson
import structlog

from gateway.config import Log


def configure(settings: Log) -> None:
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
    else:
        structlog.configure(
            processors=[
                *shared,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(serializer=orjson.dumps),
            ],
            wrapper_class=wrapper,
            logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
            cache_logger_on_first_use=True,
        )
