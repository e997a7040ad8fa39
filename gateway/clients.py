"""Who waits for an answer: the pieces of one HTTP response, written as they come."""

from __future__ import annotations

import asyncio

from aiohttp import web

from backends.trouble import Trouble
from gateway.errors import ApiError, Code
from policies.events import Fail, Fault, Reason, Reject

HIGH_WATER_BYTES = 65_536
LOW_WATER_BYTES = 16_384

_REJECTED = {
    Reason.QUEUE_FULL: (Code.QUEUE_FULL, "too many requests wait already"),
    Reason.HOPELESS: (Code.DEADLINE_HOPELESS, "the queue is too long for this request's target"),
    Reason.EXPIRED: (Code.DEADLINE_PASSED, "no server was free in time"),
    Reason.NO_WORKER: (Code.NO_WORKER, "no server is configured that could serve this request"),
    Reason.UNAVAILABLE: (Code.WORKERS_UNAVAILABLE, "no server that could serve this is available"),
    Reason.TOO_LARGE: (
        Code.CONTEXT_LENGTH_EXCEEDED,
        "the prompt is longer than any server's KV cache",
    ),
    Reason.DRAINING: (Code.GATEWAY_DRAINING, "the gateway is shutting down"),
}
_FAILED = {
    Fault.REQUEST: Code.UPSTREAM_REJECTED,
    Fault.TIMEOUT: Code.UPSTREAM_TIMEOUT,
    Fault.BUSY: Code.UPSTREAM_OVERLOADED,
}


def api_error(decision: Reject | Fail, trouble: Trouble | None, *, begun: bool) -> ApiError:
    """What the client is told; the code is stable, the message names the cause."""
    if isinstance(decision, Reject):
        code, message = _REJECTED[decision.reason]
        wait_s = max(1, -(-decision.retry_after_us // 1_000_000))
        return ApiError(code, message, retry_after_s=wait_s)
    message = trouble.message if trouble is not None else "the server could not be reached"
    if begun:
        return ApiError(Code.STREAM_INTERRUPTED, message)
    if decision.fault is Fault.REQUEST and trouble is not None:
        return ApiError(Code.UPSTREAM_REJECTED, message, status=trouble.status)
    return ApiError(_FAILED.get(decision.fault, Code.UPSTREAM_FAILED), message, retry_after_s=1)


class UnaryClient:
    """Waits for one whole body."""

    __slots__ = ("body", "content_type", "error", "over", "status")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.over: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self.status = 200
        self.content_type = "application/json"
        self.body = b""

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        self.status, self.content_type, self.body = status, content_type, body
        _resolve(self.over)

    def begin(self) -> None:
        raise RuntimeError("a whole answer was asked for")

    def write(self, piece: bytes) -> bool:
        raise RuntimeError("a whole answer was asked for")

    def has_room(self) -> bool:
        return True

    def drop(self) -> None:
        """There is nothing to close: aiohttp writes whole answers."""

    def end(self) -> None:
        raise RuntimeError("a whole answer was asked for")

    def cancelled(self) -> None:
        self.error = ApiError(Code.REQUEST_CANCELLED, "the request was aborted")
        _resolve(self.over)

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        self.error = api_error(decision, trouble, begun=False)
        _resolve(self.over)


class StreamClient:
    """Relays events straight into the client's socket, past every layer that would copy them."""

    __slots__ = ("_chunked", "_pieces", "_transport", "begun", "error", "over")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.begun: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self._pieces: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._chunked = True

    async def attach(self, response: web.StreamResponse, request: web.Request) -> None:
        """From here on pieces go out by themselves; what came before goes with the headers."""
        pieces, self._pieces = self._pieces, []
        await response.write(b"".join(pieces))
        self._chunked = bool(response.chunked)
        self._transport = request.transport
        for piece in self._pieces:
            self.write(piece)
        self._pieces = []

    def detach(self) -> None:
        self._transport = None

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        raise RuntimeError("a stream was asked for")

    def begin(self) -> None:
        _resolve(self.begun)

    def write(self, piece: bytes) -> bool:
        transport = self._transport
        if transport is None:
            self._pieces.append(piece)
            return False
        if self._chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        transport.write(piece)
        return transport.get_write_buffer_size() > HIGH_WATER_BYTES

    def has_room(self) -> bool:
        transport = self._transport
        return transport is None or transport.get_write_buffer_size() < LOW_WATER_BYTES

    def drop(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        _resolve(self.over)

    def cancelled(self) -> None:
        self.error = ApiError(Code.REQUEST_CANCELLED, "the request was aborted")
        _resolve(self.begun)
        _resolve(self.over)

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        self.error = api_error(decision, trouble, begun=self.begun.done())
        _resolve(self.begun)
        _resolve(self.over)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
