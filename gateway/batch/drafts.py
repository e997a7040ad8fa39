"""A file that is being made: its blob is announced before its first byte, held while it is written,
and litter unless a file is made of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from gateway.batch.faults import StoreFault
from gateway.batch.files import Blobs, Sink
from gateway.batch.objects import Purpose, StoredFile
from gateway.batch.store import Store

_HOLD_US: Final = 60_000_000


class Draft:
    def __init__(self, store: Store, blobs: Blobs, blob: str, now_us: Callable[[], int]) -> None:
        self._store = store
        self._blobs = blobs
        self._blob = blob
        self._now_us = now_us
        self._sink: Sink | None = None
        self._held_us = 0
        self._is_whole = False
        self.size_bytes = 0
        self.lines = 0

    @property
    def has_begun(self) -> bool:
        return self._sink is not None

    async def begin(self) -> Sink:
        await self._store.announce(self._blob)
        self._held_us = self._now_us()
        self._sink = await self._blobs.create(self._blob)
        return self._sink

    async def add(self, data: bytes, lines: int) -> None:
        sink = self._sink or await self.begin()
        await self.keep_held()
        await sink.write(data)
        self.size_bytes += len(data)
        self.lines += lines

    async def keep_held(self) -> None:
        """Once it has begun, to be said by whoever adds nothing to it for a while, too."""
        if self.has_begun and self._now_us() - self._held_us > _HOLD_US:
            await self._store.hold(self._blob)
            self._held_us = self._now_us()

    async def finish(self) -> bool:
        """False: there is nothing in it, and no file to make."""
        if self._sink is None:
            return False
        await self._sink.finish()
        self._is_whole = True
        return True

    def as_file(
        self, file_id: str, tenant: str, name: str, purpose: Purpose, expires_s: int | None
    ) -> StoredFile:
        """Once it is finished."""
        now_us = self._now_us()
        return StoredFile(
            id=file_id,
            tenant=tenant,
            name=name,
            purpose=purpose,
            size_bytes=self.size_bytes,
            lines=self.lines,
            blob=self._blob,
            created_us=now_us,
            expires_us=None if expires_s is None else now_us + expires_s * 1_000_000,
        )

    async def close(self) -> None:
        """Lets go of it. No file was made of what is not whole: its bytes go at once, since a disk
        that is full may have no room for the database to note them as litter."""
        if self._sink is None:
            return
        await self._sink.abandon()
        if not self._is_whole:
            with suppress(StoreFault):
                await self._blobs.delete(self._blob)

    async def doom(self) -> None:
        """Litter, unless a file was made of it after all: a commit may fail to be heard of."""
        if self._held_us:
            await self._store.doom([self._blob])
