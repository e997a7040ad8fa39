"""One whole answer to one small request: what pages, probes and calibration ask servers for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from backends.http import HttpError, Reason, Upstream


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: str


class _Collector:
    """Keeps an answer for `fetch`."""

    def __init__(self, done: asyncio.Future[None], max_bytes: int) -> None:
        self.done = done
        self.pieces: list[bytes] = []
        self.error: HttpError | None = None
        self._room_bytes = max_bytes

    def on_head(self, status: int) -> None:
        pass

    def on_body(self, piece: bytes) -> None:
        self._room_bytes -= len(piece)
        if self._room_bytes >= 0:
            self.pieces.append(piece)
        else:
            self.on_error(HttpError(Reason.TOO_LARGE, "too long an answer", before_head=False))

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def on_error(self, error: HttpError) -> None:
        self.error = self.error or error
        self.on_end()


async def fetch(
    upstream: Upstream,
    method: bytes,
    path: bytes,
    body: bytes = b"",
    *,
    timeout_s: float,
    max_bytes: int = 16 << 20,
    headers: bytes = b"",
) -> Answer:
    """One whole answer for control calls, or HttpError."""
    collector = _Collector(asyncio.get_running_loop().create_future(), max_bytes)
    call = upstream.send(method, path, body, collector, headers)
    try:
        async with asyncio.timeout(timeout_s):
            await collector.done
    except TimeoutError:
        late = HttpError(Reason.TIMEOUT, f"after {timeout_s} s", before_head=not call.status)
        raise late from None
    finally:
        call.cancel()
    if collector.error is not None:
        raise collector.error
    content_type = call.header(b"content-type") or b""
    return Answer(call.status, b"".join(collector.pieces), content_type.decode("latin-1"))
