"""Who waits for an answer: the pieces of one HTTP response, written as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from backends.trouble import Blame, Trouble
from gateway.errors import ApiError, Code, Dialect, error_event
from gateway.wire import LAST_CHUNK
from policies.events import Fail, Fault, Reason, Reject
from policies.types import Kind

HIGH_WATER_BYTES = 65_536
LOW_WATER_BYTES = 16_384

_REJECTED = {
    Reason.QUEUE_FULL: (Code.QUEUE_FULL, "too many requests wait already"),
    Reason.HOPELESS: (Code.DEADLINE_HOPELESS, "the queue is too long for this request's target"),
    Reason.EXPIRED: (Code.DEADLINE_PASSED, "no server was free in time"),
    Reason.NO_WORKER: (Code.NO_WORKER, "no server is configured that could serve this request"),
    Reason.NO_RELAXED: (
        Code.NO_WORKER,
        'no relaxed server is in rotation, and colocation.without_relaxed is "reject"',
    ),
    Reason.UNAVAILABLE: (Code.WORKERS_UNAVAILABLE, "no server that could serve this is available"),
    Reason.TOO_LARGE: (
        Code.CONTEXT_LENGTH_EXCEEDED,
        "the prompt is longer than any server's KV cache",
    ),
}
_WINDOW_PASSED = "no server was free within classes.offline.window_s"
_TOO_LONG = "context length"
"""What SGLang's words have in common where a prompt, or its answer's limit, is too long."""
_FAILED = {
    Fault.REQUEST: Code.UPSTREAM_REJECTED,
    Fault.TIMEOUT: Code.UPSTREAM_TIMEOUT,
    Fault.BUSY: Code.UPSTREAM_OVERLOADED,
}


def api_error(decision: Reject | Fail, trouble: Trouble | None, *, begun: bool) -> ApiError:
    """What the client is told; the code is stable, the message names the cause."""
    if isinstance(decision, Reject):
        code, message = _REJECTED[decision.reason]
        if decision.reason is Reason.EXPIRED and decision.job.kind is Kind.OFFLINE:
            message = _WINDOW_PASSED
        wait_s = max(1, -(-decision.retry_after_us // 1_000_000))
        return ApiError(code, message, retry_after_s=wait_s)
    message = trouble.message if trouble is not None else "the server could not be reached"
    if decision.fault is Fault.REQUEST and trouble is not None and trouble.blames is Blame.ABORTED:
        return ApiError(Code.REQUEST_CANCELLED, "the request was aborted")
    if begun:
        return ApiError(Code.STREAM_INTERRUPTED, message)
    if decision.fault is Fault.REQUEST and trouble is not None:
        is_long = _TOO_LONG in message
        code = Code.CONTEXT_LENGTH_EXCEEDED if is_long else Code.UPSTREAM_REJECTED
        return ApiError(code, message, status=trouble.status)
    return ApiError(_FAILED.get(decision.fault, Code.UPSTREAM_FAILED), message, retry_after_s=1)


class UnaryClient:
    """Waits for one whole body."""

    __slots__ = ("body", "content_type", "error", "fault", "over", "status")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.over: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self.fault: Fault | None = None
        """How the last attempt ended, where there was one and no answer."""
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

    def ended(self, error: ApiError) -> None:
        self.error = error
        _resolve(self.over)

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        self.fault = decision.fault if isinstance(decision, Fail) else None
        self.ended(api_error(decision, trouble, begun=False))


class StreamClient:
    """Relays events straight into the client's socket, past every layer that would copy them."""

    __slots__ = (
        "_chunked",
        "_dialect",
        "_ended",
        "_head",
        "_make_head",
        "_transport",
        "begun",
        "error",
        "over",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        make_head: Callable[[], bytes],
        *,
        dialect: Dialect,
        chunked: bool,
    ) -> None:
        self.over: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self.begun = False
        self._transport = transport
        self._make_head = make_head
        self._head = b""
        self._dialect = dialect
        self._chunked = chunked
        self._ended = False

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        raise RuntimeError("a stream was asked for")

    def begin(self) -> None:
        if not self.begun:
            self.begun = True
            self._head = self._make_head()
            self._make_head = bytes  # it holds the visit, which holds this

    def write(self, piece: bytes) -> bool:
        transport = self._transport
        if self._ended or transport.is_closing():  # a server's last bytes may come after it
            return False
        if self._chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        if self._head:
            piece, self._head = self._head + piece, b""
        transport.write(piece)
        return transport.get_write_buffer_size() > HIGH_WATER_BYTES

    def has_room(self) -> bool:
        return self._transport.get_write_buffer_size() < LOW_WATER_BYTES

    def drop(self) -> None:
        self._transport.abort()

    def end(self) -> None:
        if self._ended:
            return
        self._write_last(b"")
        self._end()

    def ended(self, error: ApiError) -> None:
        """Before the first byte it is an answer of its own, after it the stream's last event."""
        if self._ended:
            return
        self.error = error
        if self.begun:
            self._write_last(error_event(self._dialect, error))
        self._end()

    def _end(self) -> None:
        self._ended = True
        _resolve(self.over)

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        self.ended(api_error(decision, trouble, begun=self.begun))

    def _write_last(self, event: bytes) -> None:
        if event:
            self.write(event)
        last = self._head + (LAST_CHUNK if self._chunked else b"")
        if last and not self._transport.is_closing():
            self._transport.write(last)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
