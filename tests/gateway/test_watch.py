"""When a file that changes is read again, and what becomes of one that cannot be."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.app import Reading, _say_whose_servers, _watch
from gateway.config import Config, WorkerEntry, load


@dataclass
class Watch:
    path: Path
    reload: asyncio.Event
    read: list[str] = field(default_factory=list)
    """What the file held each time it was taken over."""

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def adopt(self) -> None:
        load(self.path)
        self.read.append(self.path.read_text())


@asynccontextmanager
async def watched(path: Path) -> AsyncIterator[Watch]:
    watch = Watch(path, asyncio.Event())
    watch.write("# 0")
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(_watch(path, watch.reload, loop, watch.adopt))
    try:
        await asyncio.sleep(0.25)
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_changed_file_is_read_once_it_rests(tmp_path: Path) -> None:
    async with watched(tmp_path / "config.toml") as watch:
        for text in ("", "# 1", "# half", "# the whole of it"):
            watch.write(text)
            await asyncio.sleep(0.5)
        await asyncio.sleep(10.0)
    assert watch.read == ["# the whole of it"]


async def test_many_signals_have_a_file_read_once_a_look(tmp_path: Path) -> None:
    async with watched(tmp_path / "config.toml") as watch:
        for _ in range(1_000):
            watch.reload.set()
            await asyncio.sleep(0.003)
    assert watch.read == ["# 0"] * 6


def remove(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fill_with_noise(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def clear(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "spoil", [remove, replace_by_folder, replace_by_pipe, fill_with_noise, link_to_itself]
)
async def test_a_file_that_cannot_be_read_is_told_of_once_and_read_when_it_is_mended(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    async with watched(tmp_path / "config.toml") as watch:
        with capture_logs() as told:
            spoil(watch.path)
            await asyncio.sleep(10.0)
        clear(watch.path)
        watch.write("# mended")
        await asyncio.sleep(3.0)
    assert [line["event"] for line in told] == [
        "the new configuration is refused, the old one stays"
    ]
    assert watch.read == ["# mended"]


@pytest.mark.parametrize(
    ("reading", "event"),
    [
        (Reading(config=Config(), is_emulated=True), "the emulated ones answer"),
        (Reading(config=Config()), "requests are answered 503"),
        (
            Reading(config=Config(worker=(WorkerEntry(url="http://a"),)), flags_hide_workers=True),
            "[[worker]] tables of the file do not count",
        ),
    ],
)
def test_servers_that_an_operator_does_not_expect_are_told_of(reading: Reading, event: str) -> None:
    with capture_logs() as told:
        _say_whose_servers(reading)
    assert [line["event"].endswith(event) for line in told] == [True]
