"""How an upload becomes a file: streamed to where files lie, or gone without a trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from aiohttp import BodyPartReader, ClientPayloadError, MultipartReader, web
from aiohttp.http_exceptions import BadHttpMessage

from gateway.batch.arrivals import Arrivals
from gateway.batch.asked import FORM_FIELDS, check_purpose, file_name, form_expiry
from gateway.batch.drafts import Draft
from gateway.batch.files import Blobs
from gateway.batch.objects import Purpose, Quota, StoredFile
from gateway.batch.store import Store
from gateway.errors import ApiError, Code, invalid

_CHUNK_BYTES: Final = 65_536
_PIECE_BYTES: Final = 262_144
"""Written at a time."""
_FIELD_BYTES: Final = 256
_OVERHEAD_BYTES: Final = 65_536
"""What a form may have besides its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one upload may be."""

    tenant: str
    quota: Quota
    max_bytes: int
    body_timeout_s: float
    """For each piece."""
    expires_s: int | None


class Upload:
    """One form on its way in."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        terms: Terms,
        arrivals: Arrivals,
        new_id: Callable[[str], str],
        now_us: Callable[[], int],
    ) -> None:
        self._store = store
        self._terms = terms
        self._arrival = arrivals.arrival(terms.tenant, terms.quota)
        self._new_id = new_id
        self._fields: dict[str, str] = {}
        self._name = ""
        self._draft = Draft(store, blobs, new_id("blob_"), now_us)

    async def receive(self, request: web.BaseRequest) -> StoredFile:
        await self._check_size(request.content_length)
        async with _named_failures():
            form = await request.multipart()
            while (part := await self._next(form)) is not None:
                await self._take(part)
        check_purpose(self._fields.get("purpose"))
        expires_s = form_expiry(self._fields) or self._terms.expires_s
        if not await self._draft.finish():
            raise invalid("file", "is missing")
        file = await self._kept(expires_s)
        self._arrival.end(is_kept=True)
        return file

    async def abandon(self) -> None:
        """Whatever has been written is litter, unless a file was made of it after all."""
        try:
            await self._draft.close()
        finally:
            self._arrival.end(is_kept=False)
        await self._draft.doom()

    async def _check_size(self, content_length: int | None) -> None:
        """What cannot be kept need not be sent."""
        size_bytes = content_length or 0
        if size_bytes > self._terms.max_bytes + _OVERHEAD_BYTES:
            raise self._too_large()
        held = await self._store.holdings(self._terms.tenant)
        self._arrival.begin(held.stored_bytes, size_bytes - _OVERHEAD_BYTES)

    def _too_large(self) -> ApiError:
        message = f"a file may have {self._terms.max_bytes} bytes at most"
        return ApiError(Code.BODY_TOO_LARGE, message, param="file")

    async def _next(self, form: MultipartReader) -> BodyPartReader | None:
        async with asyncio.timeout(self._terms.body_timeout_s):
            part = await form.next()
        if isinstance(part, MultipartReader):
            raise invalid("file", "must not be a form itself")
        return part

    async def _take(self, part: BodyPartReader) -> None:
        if part.name == "file" and not self._draft.has_begun:
            await self._take_file(part)
        elif part.name in FORM_FIELDS and part.name not in self._fields:
            self._fields[part.name] = await self._text(part)
        else:
            shown = ascii(part.name)[:100]
            message = f"the form has a field {shown} that is unknown, or is there already"
            raise ApiError(Code.UNKNOWN_PARAMETER, message, param=shown)

    async def _text(self, part: BodyPartReader) -> str:
        async with asyncio.timeout(self._terms.body_timeout_s):
            data = b""
            while not part.at_eof() and len(data) <= _FIELD_BYTES:
                data += await part.read_chunk(_CHUNK_BYTES)
        if len(data) > _FIELD_BYTES:
            raise invalid(str(part.name), "is too long")
        return data.decode(errors="replace")

    async def _take_file(self, part: BodyPartReader) -> None:
        self._name = file_name(part.filename)
        if "purpose" in self._fields:
            check_purpose(self._fields["purpose"])
        draft = self._draft
        await draft.begin()
        last = b""
        while piece := await self._piece(part):
            if draft.size_bytes + len(piece) > self._terms.max_bytes:
                raise self._too_large()
            self._arrival.add(len(piece))
            await draft.add(piece, piece.count(b"\n"))
            last = piece[-1:]
        draft.lines += last not in (b"", b"\n")

    async def _piece(self, part: BodyPartReader) -> bytes:
        chunks: list[bytes] = []
        room = _PIECE_BYTES
        async with asyncio.timeout(self._terms.body_timeout_s):
            while room > 0 and not part.at_eof():
                chunks.append(await part.read_chunk(_CHUNK_BYTES))
                room -= len(chunks[-1])
        return b"".join(chunks)

    async def _kept(self, expires_s: int | None) -> StoredFile:
        file_id, tenant = self._new_id("file-"), self._terms.tenant
        file = self._draft.as_file(file_id, tenant, self._name, Purpose.INPUT, expires_s)
        await self._store.add_file(file, self._terms.quota)
        return file


@asynccontextmanager
async def _named_failures() -> AsyncIterator[None]:
    try:
        yield
    except TimeoutError:
        raise ApiError(Code.REQUEST_TIMEOUT, "the upload did not arrive in time") from None
    except (web.RequestPayloadError, ClientPayloadError, BadHttpMessage):
        raise ApiError(Code.INVALID_REQUEST, "the upload is not encoded as it says") from None
    except (ValueError, AssertionError, RuntimeError, LookupError):  # aiohttp's, of a bad form
        message = "the body is not a whole form: multipart/form-data with purpose and file"
        raise ApiError(Code.INVALID_REQUEST, message) from None
