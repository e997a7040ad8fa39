"""Lines reach whoever reads them, and never stop the gateway when nobody does."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import structlog

from gateway import log
from gateway.config import Log
from gateway.log import Lines, configure


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for end in (reader, writer):
        with suppress(OSError):
            os.close(end)


@pytest.fixture
def structlog_as_it_was() -> Iterator[None]:
    handlers = logging.getLogger().handlers
    yield
    logging.getLogger().handlers = handlers
    structlog.reset_defaults()


def read(reader: int) -> bytes:
    found = b""
    with suppress(BlockingIOError):
        while piece := os.read(reader, 1 << 20):
            found += piece
    return found


async def test_lines_are_written_together_and_in_order(pipe: tuple[int, int]) -> None:
    lines = Lines(pipe[1])
    for number in range(3):
        lines.msg(b"%d" % number)
    assert read(pipe[0]) == b""
    await asyncio.sleep(0.1)
    assert read(pipe[0]) == b"0\n1\n2\n"


async def test_a_reader_that_stands_still_stops_nobody_and_misses_nothing_at_first(
    pipe: tuple[int, int],
) -> None:
    lines = Lines(pipe[1])
    said = [b"%06d" % number * 20 for number in range(4_000)]  # more than a pipe holds
    for line in said:
        lines.msg(line)
    heard = b""
    for _ in range(20):
        await asyncio.sleep(0.1)
        heard += read(pipe[0])
    assert heard.splitlines() == said
    assert lines.lost == 0


async def test_what_is_too_much_is_counted_and_told_of(pipe: tuple[int, int]) -> None:
    lines = Lines(pipe[1], kept_bytes=100_000)
    for _ in range(30):
        for _ in range(100):
            lines.msg(b"x" * 99)
        await asyncio.sleep(0.1)
    lost = lines.lost
    assert lost > 0
    heard = b""
    for _ in range(20):
        heard += read(pipe[0])
        await asyncio.sleep(0.1)
    *whole, last = heard.splitlines()
    assert set(whole) == {b"x" * 99}
    assert len(whole) + lost == 3_000
    assert json.loads(last)["lost"] == lost


async def test_a_reader_that_is_gone_is_not_waited_for(pipe: tuple[int, int]) -> None:
    lines = Lines(pipe[1])
    os.close(pipe[0])
    lines.msg(b"is anybody there?")
    await asyncio.sleep(0.1)
    lines.msg(b"no")
    await asyncio.sleep(0.1)
    assert not lines._waiting


def test_the_end_does_not_wait_for_a_reader(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_LAST_WORDS_MS", 10)
    lines = Lines(pipe[1])
    lines.msg(b"x" * 500_000)  # no loop: it is written at once, as far as it goes
    lines.close()
    assert len(read(pipe[0])) == 65_536


@pytest.mark.usefixtures("structlog_as_it_was")
@pytest.mark.parametrize("style", ["json", "console"])
async def test_everybody_speaks_through_the_same_lines(
    style: str, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with os.fdopen(os.dup(pipe[1]), "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        write = configure(Log(format=style))
        write({"event": "request", "outcome": "ok"})
        structlog.get_logger("slackwater").info("listening", port=1)
        logging.getLogger("asyncio").error("a task has failed: %s", "why")
        await asyncio.sleep(0.1)
        heard = read(pipe[0]).decode().splitlines()
    assert len(heard) == 3
    for word, line in zip(("request", "listening", "has failed: why"), heard, strict=True):
        assert word in line
