"""/v1/files and /v1/batches, as OpenAI's clients expect them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

import orjson
from aiohttp import hdrs, web
from aiohttp.helpers import content_disposition_header

from gateway.asking import Caller
from gateway.batch import asked
from gateway.batch.arrivals import Arrivals
from gateway.batch.faults import (
    Fenced,
    InUse,
    NotThere,
    QuotaExceeded,
    StorageFull,
    StorageUnavailable,
    StoreFault,
    WrongStatus,
)
from gateway.batch.files import Blobs
from gateway.batch.objects import Quota, Stage, StoredFile
from gateway.batch.ranges import wanted
from gateway.batch.settings import BatchSettings
from gateway.batch.shapes import batch_shape, file_shape, page_shape
from gateway.batch.store import Store
from gateway.batch.uploads import Terms, Upload
from gateway.errors import ApiError, Code
from gateway.router import Handler, Route

_PIECE_BYTES: Final = 262_144
_CODES: Final[dict[type[StoreFault], Code]] = {
    StorageFull: Code.STORAGE_FULL,
    StorageUnavailable: Code.STORAGE_UNAVAILABLE,
    QuotaExceeded: Code.QUOTA_EXCEEDED,
    NotThere: Code.NOT_FOUND,
    InUse: Code.FILE_IN_USE,
    WrongStatus: Code.BATCH_HAS_ENDED,
    Fenced: Code.STORAGE_UNAVAILABLE,
}


class Shell(Protocol):
    """What the routes need of the gateway around them."""

    body_timeout_s: float
    draining: bool

    def caller(self, request: web.BaseRequest) -> Caller: ...

    async def body_of(self, request: web.BaseRequest) -> bytes: ...


class Pages:
    def __init__(
        self,
        settings: BatchSettings,
        shell: Shell,
        opened: Callable[[], tuple[Store, Blobs]],
        new_id: Callable[[str], str],
        now_us: Callable[[], int],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        wake: Callable[[Stage], object],
    ) -> None:
        """`opened` raises StorageUnavailable while there is no database; what `spawn` is given
        goes on when its request does not."""
        self._settings = settings
        self._shell = shell
        self._opened = opened
        self._new_id = new_id
        self._now_us = now_us
        self._spawn = spawn
        self._wake = wake
        self._arrivals = Arrivals()

    def routes(self) -> list[Route]:
        pages: list[Route] = [
            ("POST", "/v1/files", self.upload),
            ("GET", "/v1/files", self.list_files),
            ("GET", "/v1/files/*", self.get_file),
            ("DELETE", "/v1/files/*", self.delete_file),
            ("POST", "/v1/batches", self.create_batch),
            ("GET", "/v1/batches", self.list_batches),
            ("GET", "/v1/batches/*", self.get_batch),
            ("POST", "/v1/batches/*", self.cancel_batch),
        ]
        return [(method, path, _naming_faults(handler)) for method, path, handler in pages]

    # Files.

    async def upload(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, writes=True)
        if request.content_type != "multipart/form-data":
            message = "a file is sent as multipart/form-data, with purpose and file"
            raise ApiError(Code.INVALID_REQUEST, message)
        store, blobs = self._opened()
        terms = Terms(
            tenant=caller.tenant,
            quota=self._quota(caller),
            max_bytes=round(self._settings.max_file_mb * 1_048_576),
            body_timeout_s=self._shell.body_timeout_s,
            expires_s=round(self._settings.file_expires_s) or None,
        )
        upload = Upload(store, blobs, terms, self._arrivals, self._new_id, self._now_us)
        try:
            return _json(file_shape(await upload.receive(request)))
        except BaseException:  # whatever it was, the client's leaving included
            self._spawn(upload.abandon())
            raise

    async def list_files(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request)
        listing = asked.files_listing(request.query)
        files, has_more = await self._store.files(
            caller.tenant,
            limit=listing.limit,
            after=listing.after,
            order=listing.order,
            purpose=listing.purpose,
        )
        return await self._page_of(files, has_more=has_more)

    async def _page_of(self, files: Sequence[StoredFile], *, has_more: bool) -> web.Response:
        """Ten thousand of them take their time, which is not the event loop's."""
        _, blobs = self._opened()

        def page() -> web.Response:
            return _json(page_shape([file_shape(file) for file in files], has_more=has_more))

        return await blobs.beside_loop(page)

    async def get_file(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request)
        file_id, action = _parts(request, "/v1/files/", "content")
        file = await self._store.file(caller.tenant, file_id)
        if not action:
            return _json(file_shape(file))
        return await self._content(request, file)

    async def _content(self, request: web.BaseRequest, file: StoredFile) -> web.StreamResponse:
        part = wanted(request.headers.get(hdrs.RANGE), file.size_bytes)
        start, stop = part or (0, file.size_bytes)
        _, blobs = self._opened()
        first = b""
        if start < stop:  # what cannot be read is an error while the status is open
            first = await blobs.read(file.blob, start, min(_PIECE_BYTES, stop - start))
        response = web.StreamResponse(status=200 if part is None else 206)
        response.content_type = "application/octet-stream"
        response.content_length = stop - start
        headers = response.headers
        headers[hdrs.ACCEPT_RANGES] = "bytes"
        headers[hdrs.CONTENT_DISPOSITION] = content_disposition_header(
            "attachment", filename=file.name
        )
        if part is not None:
            headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{file.size_bytes}"
        await response.prepare(request)
        if request.method != hdrs.METH_HEAD:
            await self._write(response, blobs, file, first, start, stop)
        return response

    async def _write(
        self,
        response: web.StreamResponse,
        blobs: Blobs,
        file: StoredFile,
        piece: bytes,
        start: int,
        stop: int,
    ) -> None:
        """A client that reads slowly keeps one piece in memory."""
        while start < stop:
            if not piece:
                raise ConnectionResetError("the file's bytes have ended too soon")
            await response.write(piece)
            start += len(piece)
            if start < stop:
                piece = await self._next_piece(blobs, file, start, stop)

    async def _next_piece(self, blobs: Blobs, file: StoredFile, start: int, stop: int) -> bytes:
        """The answer has begun: what fails now can only cut it off."""
        try:
            return await blobs.read(file.blob, start, min(_PIECE_BYTES, stop - start))
        except StoreFault as fault:
            raise ConnectionResetError(str(fault)) from fault

    async def delete_file(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request)
        file_id, _ = _parts(request, "/v1/files/")
        await self._store.delete_file(caller.tenant, file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    # Batches.

    async def create_batch(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request, writes=True)
        raw = await self._shell.body_of(request)
        batch_id = self._new_id("batch_")
        new = asked.new_batch(raw, caller.tenant, batch_id, self._settings.max_window_s)
        try:
            batch = await self._store.add_batch(new, self._quota(caller))
        except NotThere as fault:
            raise ApiError(Code.NOT_FOUND, str(fault), param="input_file_id") from None
        self._wake(Stage.VALIDATE)
        return _json(batch_shape(batch, self._now_us()))

    async def list_batches(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request)
        listing = asked.batches_listing(request.query)
        found, has_more = await self._store.batches(
            caller.tenant, limit=listing.limit, after=listing.after
        )
        now_us = self._now_us()
        return _json(page_shape([batch_shape(it, now_us) for it in found], has_more=has_more))

    async def get_batch(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request)
        batch_id, _ = _parts(request, "/v1/batches/")
        batch = await self._store.batch(caller.tenant, batch_id)
        return _json(batch_shape(batch, self._now_us()))

    async def cancel_batch(self, request: web.BaseRequest) -> web.StreamResponse:
        caller = self._caller(request)
        batch_id, action = _parts(request, "/v1/batches/", "cancel")
        if not action:
            raise ApiError(Code.METHOD_NOT_ALLOWED, "a batch is cancelled at .../cancel")
        batch = await self._store.cancel(caller.tenant, batch_id)
        self._wake(Stage.FINALIZE)
        return _json(batch_shape(batch, self._now_us()))

    # What they share.

    @property
    def _store(self) -> Store:
        return self._opened()[0]

    def _caller(self, request: web.BaseRequest, *, writes: bool = False) -> Caller:
        if writes and self._shell.draining:
            raise ApiError(Code.GATEWAY_DRAINING, "the gateway is shutting down", retry_after_s=1)
        return self._shell.caller(request)

    def _quota(self, caller: Caller) -> Quota:
        settings, key = self._settings, caller.key
        stored_gb = (key and key.stored_gb) or settings.stored_gb
        return Quota(
            stored_bytes=round(stored_gb * 1e9),
            open_batches=(key and key.open_batches) or settings.open_batches,
            open_rows=(key and key.open_rows) or settings.open_rows,
        )


def _parts(request: web.BaseRequest, prefix: str, action: str = "") -> tuple[str, bool]:
    """The id in a path, and whether the action comes after it."""
    name, slash, rest = request.path.removeprefix(prefix).partition("/")
    is_id = 0 < len(name) <= 64 and name.isprintable()
    if not is_id or (slash and (not action or rest != action)):
        raise ApiError(Code.NOT_FOUND, f"there is no page {request.path}")
    return name, bool(slash)


def _naming_faults(handler: Handler) -> Handler:
    async def call(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except StoreFault as fault:
            code = next(code for kind, code in _CODES.items() if isinstance(fault, kind))
            raise ApiError(code, str(fault), retry_after_s=5) from fault

    return call


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
