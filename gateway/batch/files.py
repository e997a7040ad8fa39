"""Where the bytes of files lie: a folder, or any place that fsspec knows, off the event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Final, ParamSpec, Protocol, TypeVar

from gateway.batch.faults import NotThere, StorageFull, StorageUnavailable, StoreFault
from gateway.batch.threads import Threads
from gateway.batch.throttle import Throttle

T = TypeVar("T")
P = ParamSpec("P")

Range = tuple[int, int]
"""Start and length, in bytes."""

_THREADS: Final = 4
_PATIENCE_S: Final = 60.0
"""For a disk or a bucket that hangs."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Writing(Protocol):
    """What a file object can do, as far as it is needed."""

    def write(self, data: bytes, /) -> object: ...

    def close(self) -> object:
        """Everything is there for good once this has returned."""


class Shelf(Protocol):
    """Blobs by key, synchronously. What is on it never changes: it comes, and it goes."""

    def create(self, blob: str) -> Writing: ...

    def read(self, blob: str, ranges: Sequence[Range]) -> list[bytes]:
        """Less than was asked for where the blob ends before that."""

    def delete(self, blob: str) -> None:
        """One that is not there is gone."""


def _private(path: Path, flags: int) -> int:
    """Prompts and answers are nobody else's to read."""
    return os.open(path, flags, 0o600)


class Folder:
    """One file for each blob, named by its key."""

    def __init__(self, path: Path, opened: Callable[[Path, int], int] = _private) -> None:
        self._path = path
        self._open = opened
        path.mkdir(parents=True, exist_ok=True)

    def create(self, blob: str) -> Writing:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return _DurableFile(self._open(self._path / blob, flags), self._path)

    def read(self, blob: str, ranges: Sequence[Range]) -> list[bytes]:
        descriptor = self._open(self._path / blob, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return [os.pread(descriptor, length, start) for start, length in ranges]
        finally:
            os.close(descriptor)

    def delete(self, blob: str) -> None:
        (self._path / blob).unlink(missing_ok=True)


class _DurableFile:
    def __init__(self, descriptor: int, folder: Path) -> None:
        self._descriptor = descriptor
        self._folder = folder

    def write(self, data: bytes, /) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def close(self) -> None:
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Remote:
    """Any of fsspec's file systems, such as s3://bucket/prefix."""

    def __init__(self, url: str) -> None:
        self._system, self._root = import_module("fsspec.core").url_to_fs(url)
        self._system.makedirs(self._root, exist_ok=True)

    def create(self, blob: str) -> Writing:
        opened: Writing = self._system.open(self._path(blob), "wb")
        return opened

    def read(self, blob: str, ranges: Sequence[Range]) -> list[bytes]:
        path = self._path(blob)
        starts = [start for start, _ in ranges]
        ends = [start + length for start, length in ranges]
        paths = [path] * len(ranges)
        found: list[bytes] = self._system.cat_ranges(paths, starts, ends, on_error="raise")
        return found

    def delete(self, blob: str) -> None:
        with suppress(FileNotFoundError):
            self._system.rm_file(self._path(blob))

    def _path(self, blob: str) -> str:
        return f"{self._root.rstrip('/')}/{blob}"


def shelf_at(place: str) -> Shelf:
    """A folder's path, or a URL."""
    with naming_failures():
        try:
            return Remote(place) if "://" in place else Folder(Path(place))
        except ModuleNotFoundError as error:
            raise StorageUnavailable(f"{place} needs the Python package {error.name}") from error


class Sink:
    """A blob that is being written; it is whole once `finish` has returned."""

    def __init__(self, blobs: Blobs, blob: str, writing: Writing) -> None:
        self.blob = blob
        self._blobs = blobs
        self._writing: Writing | None = writing
        self._turn = threading.Lock()
        """A write whose caller was cancelled goes on in its thread; the next waits for it."""

    async def write(self, data: bytes) -> None:
        await self._blobs.let(len(data))
        await self._blobs.off_loop(self._write, data)

    async def finish(self) -> None:
        await self._blobs.off_loop(self._close)

    async def abandon(self) -> None:
        """Lets go of it. Whoever knows that no file was made of it deletes it."""
        with suppress(StoreFault):
            await self.finish()

    def _write(self, data: bytes) -> None:
        with self._turn:
            if self._writing is not None:
                self._writing.write(data)

    def _close(self) -> None:
        with self._turn:
            writing, self._writing = self._writing, None
            if writing is not None:
                writing.close()


class Blobs:
    """The shelf as the event loop sees it: everything runs in a few threads of its own, and what
    is long passes at a measured pace."""

    def __init__(self, shelf: Shelf, throttle: Throttle | None = None) -> None:
        """Without a throttle, as fast as it goes."""
        self.shelf = shelf
        self._throttle = throttle
        self._threads = Threads(_THREADS, "slackwater-files")

    async def create(self, blob: str) -> Sink:
        return Sink(self, blob, await self.off_loop(self.shelf.create, blob))

    async def let(self, size_bytes: int) -> None:
        """To be awaited before so many bytes of a long file are worked on."""
        if self._throttle is not None:
            await self._throttle.let(size_bytes)

    async def read(self, blob: str, start: int, length: int) -> bytes:
        await self.let(length)
        return (await self.off_loop(self.shelf.read, blob, [(start, length)]))[0]

    async def read_many(self, blob: str, ranges: Sequence[Range]) -> list[bytes]:
        """Lines of rows that are to run: they do not wait behind files."""
        return await self.off_loop(self.shelf.read, blob, ranges)

    async def delete(self, blob: str) -> None:
        await self.off_loop(self.shelf.delete, blob)

    async def off_loop(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def named() -> T:
            with naming_failures():
                return work(*args, **kwargs)

        return await self.beside_loop(named)

    async def beside_loop(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What is no matter of storage fails under its own names."""
        return await in_time(self._threads, _PATIENCE_S, partial(work, *args, **kwargs))

    def close(self) -> None:
        """What is under way comes to nothing, and so does what comes later."""
        self._threads.close()


async def in_time(threads: Threads, seconds: float, work: Callable[[], T]) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await threads.call(work)
    except TimeoutError:  # its thread goes on: whatever it comes to, nobody waits for it
        raise StorageUnavailable("the files: no answer in time") from None


@contextmanager
def naming_failures() -> Iterator[None]:
    try:
        yield
    except (StoreFault, AssertionError):
        raise
    except FileNotFoundError as error:
        raise NotThere("the file's bytes are gone") from error
    except OSError as error:
        kind = StorageFull if error.errno in _FULL else StorageUnavailable
        raise kind(f"the files: {error.strerror or error}") from error
    except Exception as error:  # file systems of others: their errors have no root in common
        raise StorageUnavailable(f"the files: {error}") from error
