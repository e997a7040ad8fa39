"""Where bytes lie, and what becomes of them when something goes wrong."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
import pytest

from gateway.batch.faults import NotThere, StorageFull, StorageUnavailable
from gateway.batch.files import Blobs, Folder, Range, shelf_at
from gateway.batch.lines import bodies
from tests.gateway.batch.served import jsonl, row
from tests.gateway.batch.stored import a_row

pytestmark = pytest.mark.real_time


@pytest.fixture(params=["folder", "memory://slackwater/batches"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blobs]:
    place = str(tmp_path / "files") if request.param == "folder" else request.param
    made = Blobs(shelf_at(place))
    yield made
    made.close()


async def kept(blobs: Blobs, blob: str, *pieces: bytes) -> None:
    sink = await blobs.create(blob)
    for piece in pieces:
        await sink.write(piece)
    await sink.finish()


async def test_what_is_written_is_read_in_any_part(blobs: Blobs) -> None:
    await kept(blobs, "one", b"hello ", b"world")
    assert await blobs.read("one", 0, 99) == b"hello world"
    assert await blobs.read_many("one", [(6, 5), (0, 1)]) == [b"world", b"h"]
    assert await blobs.read("one", 11, 5) == b""


async def test_what_is_deleted_is_gone_and_may_be_deleted_again(blobs: Blobs) -> None:
    await kept(blobs, "two", b"x")
    await blobs.delete("two")
    await blobs.delete("two")
    with pytest.raises(NotThere):
        await blobs.read("two", 0, 1)


async def test_bodies_come_in_the_order_of_the_rows(blobs: Blobs) -> None:
    lines = [jsonl(row(n, body={"n": n})) for n in range(3)]
    await kept(blobs, "three", *lines)
    places = [(sum(map(len, lines[:n])), len(lines[n]) - 1) for n in (2, 0)]
    rows = [a_row(blob="three", number=n, place=place) for n, place in enumerate(places)]
    assert await bodies(blobs, rows) == [b'{"n":2}', b'{"n":0}']


async def test_lines_are_read_and_parsed_a_bounded_size_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [jsonl(row(n, body={"n": n})) for n in range(5)]
    length = len(lines[0])
    monkeypatch.setattr("gateway.batch.lines._AT_ONCE_BYTES", 2 * length)
    reads: list[int] = []

    class Counted(Folder):
        def read(self, blob: str, ranges: Sequence[Range]) -> list[bytes]:
            reads.append(len(ranges))
            return super().read(blob, ranges)

    blobs = Blobs(Counted(tmp_path))
    await kept(blobs, "four", *lines)
    rows = [a_row(blob="four", number=n, place=(n * length, length - 1)) for n in range(5)]
    assert await bodies(blobs, rows) == [b'{"n":%d}' % n for n in range(5)]
    assert reads == [2, 2, 1]
    blobs.close()


async def test_a_line_that_is_not_json_is_no_trouble_of_the_storage(blobs: Blobs) -> None:
    await kept(blobs, "five", b"{nonsense")
    with pytest.raises(orjson.JSONDecodeError):
        await bodies(blobs, [a_row(blob="five", number=1, place=(0, 9))])


async def test_a_blob_cannot_be_written_twice(tmp_path: Path) -> None:
    blobs = Blobs(Folder(tmp_path))
    await kept(blobs, "one", b"x")
    with pytest.raises(StorageUnavailable):
        await blobs.create("one")
    blobs.close()


async def test_a_full_disk_has_a_name_and_what_was_begun_can_be_deleted(tmp_path: Path) -> None:
    def full(path: Path, flags: int) -> int:
        os.close(os.open(path, flags))
        return os.open("/dev/full", os.O_WRONLY)

    blobs = Blobs(Folder(tmp_path, opened=full))
    sink = await blobs.create("one")
    with pytest.raises(StorageFull):
        await sink.write(b"x")
    await sink.abandon()
    await blobs.delete("one")
    assert os.listdir(tmp_path) == []
    blobs.close()


async def test_writes_after_the_end_are_nobodys(tmp_path: Path) -> None:
    """A request that was cancelled may have one on its way still."""
    blobs = Blobs(Folder(tmp_path))
    sink = await blobs.create("one")
    await asyncio.wait([asyncio.create_task(sink.abandon()) for _ in range(2)])
    await sink.write(b"late")
    assert (tmp_path / "one").read_bytes() == b""
    blobs.close()


async def test_a_disk_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()

    class Hanging(Folder):
        def read(self, blob: str, ranges: Sequence[Range]) -> list[bytes]:
            hangs.wait()
            return super().read(blob, ranges)

    monkeypatch.setattr("gateway.batch.files._PATIENCE_S", 0.05)
    blobs = Blobs(Hanging(tmp_path))
    await kept(blobs, "one", b"x")
    with pytest.raises(StorageUnavailable, match="in time"):
        await blobs.read_many("one", [(0, 1)])
    hangs.set()
    monkeypatch.undo()
    assert await blobs.read("one", 0, 1) == b"x"
    blobs.close()


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageUnavailable, match="exists"):
        shelf_at(str(tmp_path / "file"))
    with pytest.raises(StorageUnavailable, match="nosuchsystem"):
        shelf_at("nosuchsystem://bucket")


async def test_only_the_gateways_user_may_read_prompts_and_answers(tmp_path: Path) -> None:
    blobs = Blobs(Folder(tmp_path))
    await kept(blobs, "mine", b"x")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    blobs.close()
