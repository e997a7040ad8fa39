"""The Batch API as a client on this machine sees it: uploads, batches, downloads, refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
import orjson

from backends.words import in_words

PIECE_BYTES = 1 << 18
_CONNECT_S = 10.0
_QUIET_S = 60.0

Advance = Callable[[int], object]


class BatchError(Exception):
    """The gateway refused, or is not there; the message is for people."""


class BatchClient:
    """One gateway, with the key of one tenant."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url.rstrip("/")

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str, api_key: str) -> AsyncIterator[Self]:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_QUIET_S)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as http:
            yield cls(http, url)

    async def upload(self, path: Path, advance: Advance) -> dict[str, Any]:
        """Never all of it in memory; `advance` hears how many bytes went out."""
        with path.open("rb") as file:

            async def pieces() -> AsyncIterator[bytes]:
                while piece := file.read(PIECE_BYTES):
                    yield piece
                    advance(len(piece))

            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            payload = aiohttp.payload.AsyncIterablePayload(
                pieces(), content_type="application/jsonl"
            )
            form.add_field("file", payload, filename=path.name)
            return await self._ask("POST", "/v1/files", data=form)

    async def create(
        self, file_id: str, endpoint: str, window: str, metadata: Mapping[str, str]
    ) -> dict[str, Any]:
        body = {
            "input_file_id": file_id,
            "endpoint": endpoint,
            "completion_window": window,
            **({"metadata": dict(metadata)} if metadata else {}),
        }
        return await self._ask("POST", "/v1/batches", json=body)

    async def delete(self, file_id: str) -> None:
        await self._ask("DELETE", f"/v1/files/{file_id}")

    async def batch(self, batch_id: str) -> dict[str, Any]:
        return await self._ask("GET", f"/v1/batches/{batch_id}")

    async def cancel(self, batch_id: str) -> dict[str, Any]:
        return await self._ask("POST", f"/v1/batches/{batch_id}/cancel")

    async def page(self, limit: int, after: str | None) -> dict[str, Any]:
        query = {"limit": str(limit), **({"after": after} if after else {})}
        return await self._ask("GET", "/v1/batches", params=query)

    async def download(
        self, file_id: str, write: Callable[[bytes], object], advance: Advance
    ) -> None:
        path = f"/v1/files/{file_id}/content"
        async with self._asked("GET", path) as response:
            async for piece in response.content.iter_chunked(PIECE_BYTES):
                write(piece)
                advance(len(piece))

    async def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        async with self._asked(method, path, **more) as response:
            raw = await response.read()
        try:
            told = orjson.loads(raw)
        except orjson.JSONDecodeError:
            told = None
        if not isinstance(told, dict):
            raise BatchError(f"{self._url}{path} did not answer as a gateway does")
        return told

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, **more: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._http.request(method, self._url + path, **more) as response:
                if response.status >= 400:
                    raise BatchError(_refusal(response.status, await response.read()))
                yield response
        except aiohttp.ClientError as error:
            raise BatchError(f"{self._url}: {in_words(error)}") from error
        except TimeoutError:
            raise BatchError(f"{self._url} does not answer") from None


def _refusal(status: int, raw: bytes) -> str:
    try:
        error = orjson.loads(raw)["error"]
        return f"{error['message']} ({error['code']}, status {status})"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"status {status}: {raw[:200].decode(errors='replace')}"
