"""When a file that changes is read again, and what becomes of one that cannot be."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.app import Reading, _Reader, _say_whose_servers, _watch
from gateway.changes import changed_keys
from gateway.config import Config, Key, WorkerEntry, load


@dataclass
class Watch:
    path: Path
    reload: asyncio.Event
    read: list[str] = field(default_factory=list)
    """What the file held each time it was taken over."""

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def adopt(self) -> list[str]:
        load(self.path)
        self.read.append(self.path.read_text())
        return ["policies.order"]


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


async def test_a_reload_names_the_keys_that_it_has_changed(tmp_path: Path) -> None:
    async with watched(tmp_path / "config.toml") as watch:
        with capture_logs() as told:
            watch.write("# 1")
            await asyncio.sleep(3.0)
    (line,) = told
    assert (line["event"], line["changed"]) == ("configuration reloaded", ["policies.order"])


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


class Adopting:
    """A gateway that takes every configuration."""

    def adopt(self, config: Config) -> list[str]:
        return []


def test_whose_servers_answer_is_said_again_only_when_that_changes() -> None:
    emulated = Reading(config=Config(), is_emulated=True)
    own = Reading(config=Config(worker=(WorkerEntry(url="http://a"),)))
    readings = iter([emulated, emulated, own, own, emulated])
    reader = _Reader(Adopting(), lambda: next(readings), emulated)  # type: ignore[arg-type]
    said = []
    for _ in range(5):
        with capture_logs() as told:
            reader.adopt()
        said.append(len(told))
    assert said == [0, 0, 0, 0, 1]


def test_changed_keys_are_named_as_the_file_has_them_and_without_their_values() -> None:
    old = Config(key=(Key(key="secret", tenant="t"),))
    new = replace(
        old,
        policies=replace(old.policies, order="fcfs"),
        classes=replace(old.classes, online=replace(old.classes.online, ttft_ms=1.0)),
        worker=(WorkerEntry(url="http://a"),),
        key=(Key(key="other", tenant="t"),),
    )
    assert changed_keys(old, old) == []
    assert changed_keys(old, new) == ["policies.order", "classes.online.ttft_ms", "worker", "key"]
    assert changed_keys(old.server, replace(old.server, port=1), "server.") == ["server.port"]
