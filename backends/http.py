"""How bytes reach one server and come back: pooled HTTP/1.1 connections, callbacks, no tasks."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import takewhile
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from backends.words import in_words

# A stale connection shows itself within a round trip. A server that dies later may have begun the
# work (a step takes longer than this), so whoever asked decides whether to ask again.
_RESEND_WITHIN_S = 0.005
_SWEEP_AT_LEAST_S = 0.01
_KEPT_HEADS = 16

_TARGET = re.compile(rb"/[!-~]*")
_HEADER_LINES = re.compile(
    rb"(?:(?!(?:host|connection|content-length|transfer-encoding|expect|upgrade|te|trailer):)"
    rb"[!#$%&'*+.^_`|~0-9a-z-]+:[^\r\n\0]*\r\n)*",
    re.IGNORECASE,
)
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux alone has it
_USUALLY_WITHOUT_BODY = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})
_GARBAGE = (httptools.HttpParserError, httptools.HttpParserUpgrade)


class Reason(StrEnum):
    """Why no whole answer came."""

    CONNECT = "connect_failed"
    CONNECT_TIMEOUT = "connect_timeout"
    CLOSED = "closed"
    PROTOCOL = "protocol"
    TIMEOUT = "timeout"
    """Only from `fetch.py`, as the next one."""
    TOO_LARGE = "too_large"


class HttpError(Exception):
    def __init__(self, reason: Reason, detail: str, *, before_head: bool) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.before_head = before_head
        """No status had come, so nothing can have been relayed."""


class Listener(Protocol):
    """Who wants an answer: hears on_end or on_error once, and nothing more after a cancel.

    No callback runs inside `send`. One that raises ends its own call and nothing else; its error
    goes to the loop's exception handler.
    """

    def on_head(self, status: int) -> None: ...

    def on_body(self, piece: bytes) -> None:
        """What one read of the socket brought."""

    def on_end(self) -> None:
        """The whole answer has come, and its connection is free again."""

    def on_error(self, error: HttpError) -> None: ...


class Call:
    """One request under way."""

    __slots__ = (
        "_connecting",
        "_connection",
        "_head_only",
        "_headers",
        "_listener",
        "_over",
        "_paused",
        "_trickles",
        "status",
    )

    def __init__(self, listener: Listener, *, head_only: bool) -> None:
        self.status = 0
        self._trickles = False
        self._listener = listener
        self._head_only = head_only
        self._headers: dict[bytes, bytes] = {}
        self._over = False
        self._paused = False
        self._connecting: asyncio.Task[_Connection] | None = None
        self._connection: _Connection | None = None

    def header(self, name: bytes) -> bytes | None:
        """A header of the answer, asked for in lower case; the first if it came repeatedly."""
        if (value := self._headers.get(name)) is not None:
            return value
        return next((value for key, value in self._headers.items() if key.lower() == name), None)

    def cancel(self) -> None:
        """Closes the socket, which is how a server learns that nobody waits any more."""
        connecting, connection = self._connecting, self._connection
        self._detach()
        if connecting is not None:
            connecting.cancel()
        if connection is not None:
            connection.drop()

    def trickles(self) -> None:
        """The answer will be a stream of small pieces."""
        self._trickles = True
        if self._connection is not None:
            self._connection.spare_acknowledgements()

    def pause(self) -> None:
        """Stops reading; what has been read already may still be told."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        if self._connection is not None:
            self._connection.resume()

    def _detach(self) -> None:
        self._over = True
        self._connecting = self._connection = None

    def _fail(self, loop: asyncio.AbstractEventLoop, reason: Reason, detail: str) -> None:
        if self._over:
            return
        self._detach()
        try:
            self._listener.on_error(HttpError(reason, detail, before_head=not self.status))
        except Exception as error:  # noqa: BLE001  # a listener's error is its own
            _report(loop, error)

    def _ends_with_connection(self) -> bool:
        coding = self.header(b"transfer-encoding")
        if coding is not None:
            return not coding.lower().endswith(b"chunked")
        return self.header(b"content-length") is None


class _Connection(asyncio.Protocol):
    """One socket, and at most one call on it.

    The parser's callbacks only take notes: listeners run after it has returned, so that they may
    cancel, pause or send, and so that their errors are not the parser's. Headers and pieces go
    from the parser into a dict and a list without a Python frame.
    """

    __slots__ = (
        "_call",
        "_ended",
        "_feed",
        "_headers",
        "_keep",
        "_loop",
        "_news",
        "_parser",
        "_pieces",
        "_request",
        "_sent_s",
        "_status",
        "_transport",
        "_upstream",
        "on_body",
        "on_header",
    )

    def __init__(self, upstream: Upstream, loop: asyncio.AbstractEventLoop) -> None:
        self._upstream = upstream
        self._loop = loop
        self._call: Call | None = None
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._request = b""  # kept only while it may have to be sent again
        self._sent_s = 0.0
        self._status = 0
        self._news = self._ended = self._keep = False
        self.on_header = self._headers.setdefault
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._feed = self._parser.feed_data

    @property
    def closing(self) -> bool:
        return self._transport.is_closing()

    def send(self, call: Call, request: bytes, *, reused: bool) -> None:
        self._call = call
        call._connection = self
        self._status = 0
        self._ended = False
        self._headers.clear()
        if reused:
            self._request = request
            self._sent_s = self._loop.time()
        if call._paused:
            self.pause()
        if call._trickles:
            self.spare_acknowledgements()
        self._transport.write(request)

    def spare_acknowledgements(self) -> None:
        """Else Linux answers each small piece, when it is read, with a packet of its own, which
        costs more than the read. So it acknowledges every second one, or after 40 ms."""
        sock = self._transport.get_extra_info("socket")
        if _QUICKACK is not None and sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 0)

    def drop(self) -> None:
        self._call = None
        self._transport.abort()

    def pause(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def on_message_begin(self) -> None:
        self._request = b""
        if self._ended:
            raise ValueError("more than one answer to one request")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._headers.clear()
            return
        self._status = status
        self._news = True
        if (call := self._call) is not None:
            call._headers = self._headers.copy()  # without trailers, which come into the same dict
            if call._head_only:
                # The parser would wait for the body, so this connection serves no further call.
                self._ended, self._keep = True, False

    def on_message_complete(self) -> None:
        if self._status and not self._ended:
            self._news = self._ended = True
            self._keep = self._parser.should_keep_alive()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._upstream._connections.add(self)

    def data_received(self, data: bytes) -> None:
        call = self._call
        if call is None:  # nobody asked
            self._upstream._idle.pop(self, None)
            self._transport.abort()
            return
        try:
            self._feed(data)
        except _GARBAGE as error:
            self._tell(call, error)
            return
        if self._news:
            self._tell(call, None)
        elif pieces := self._pieces:
            piece = pieces.pop() if len(pieces) == 1 else self._take_pieces()
            try:
                call._listener.on_body(piece)
            except Exception as error:  # noqa: BLE001  # a listener's error is its own
                self._listener_raised(call, error)

    def eof_received(self) -> None:
        # Not left to the transport, which would first flush a request that nobody reads.
        self._upstream._idle.pop(self, None)
        self._lost(None)
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream._connections.discard(self)
        self._upstream._idle.pop(self, None)
        self._lost(exc)
        del self._parser, self._feed  # they hold this connection

    def _take_pieces(self) -> bytes:
        whole = b"".join(self._pieces)  # does not copy a single one
        self._pieces.clear()
        return whole

    def _tell(self, call: Call, garbage: Exception | None) -> None:
        """Tells the listener what the parser noted, in order, for as long as it listens."""
        self._news = False
        listener = call._listener
        try:
            if self._status and not call.status:
                call.status = self._status
                listener.on_head(call.status)
            if self._pieces and not call._over:
                listener.on_body(self._take_pieces())
            if self._ended and not call._over:
                self._release(call, keep=garbage is None)
                listener.on_end()
        except Exception as error:  # noqa: BLE001  # a listener's error is its own
            self._listener_raised(call, error)
        if garbage is not None and not call._over:
            self.drop()
            call._fail(self._loop, Reason.PROTOCOL, str(garbage))

    def _listener_raised(self, call: Call, error: Exception) -> None:
        call.cancel()
        _report(self._loop, error)

    def _release(self, call: Call, *, keep: bool) -> None:
        self._call = None
        call._detach()
        if call._paused:
            self.resume()
        # A server that answers before it has read the request leaves the rest of it in the way.
        if keep and self._keep and not self._transport.get_write_buffer_size():
            self._upstream._park(self)
        else:
            self._transport.abort()

    def _lost(self, error: Exception | None) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        if call.status and error is None and call._ends_with_connection():
            call._detach()
            try:
                call._listener.on_end()
            except Exception as raised:  # noqa: BLE001  # a listener's error is its own
                _report(self._loop, raised)
        elif self._request and self._loop.time() - self._sent_s <= _RESEND_WITHIN_S:
            self._upstream._connect(call, self._request)
        else:
            call._fail(self._loop, Reason.CLOSED, str(error or "the server closed the connection"))


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int
    authority: str
    path: str
    secure: bool


class Upstream:
    """One server: its address and its connections. The caller's own concurrency is the limit."""

    def __init__(
        self,
        url: str,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        connect_timeout_s: float = 5.0,
        idle_s: float = 4.0,  # SGLang's server closes after 5
        max_idle: int = 1024,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        address = _parse(url)
        self._loop = loop or asyncio.get_running_loop()
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._max_idle = max_idle
        self._host, self._port = address.host, address.port
        self._ssl = (ssl_context or ssl.create_default_context()) if address.secure else None
        self._path = address.path.encode()
        fixed = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._fixed = b"host: %b\r\n" % address.authority.encode() + _checked(fixed.encode())
        self._posts: dict[bytes, bytes] = {}
        """The heads of requests that come again and again, by path."""
        self._connections: set[_Connection] = set()
        self._idle: dict[_Connection, float] = {}  # since when, oldest first
        self._connecting: dict[Call, asyncio.Task[_Connection]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def open(self) -> int:
        """Sockets, busy and idle."""
        return len(self._connections)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def send(
        self,
        method: bytes,
        path: bytes,
        body: bytes,
        listener: Listener,
        headers: bytes = b"",
    ) -> Call:
        """Asks at once if an idle connection is there, else as soon as one is.

        `headers` holds whole lines, `name: value\\r\\n` each; `header_line` makes one.
        """
        request = self._request(method, path, body, headers)
        call = Call(listener, head_only=method == b"HEAD")
        fresh_since = self._loop.time() - self._idle_s
        while self._idle:
            connection, since = self._idle.popitem()
            if since > fresh_since and not connection.closing:
                connection.send(call, request, reused=True)
                return call
            connection.drop()
        self._connect(call, request)
        return call

    def retire(self) -> None:
        """From now on no socket outlives its call; those under way end as they would have."""
        self._max_idle = 0
        while self._idle:
            self._idle.popitem()[0].drop()

    def close(self) -> None:
        """Closes all sockets; calls under way fail as if the server had closed them."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._idle.clear()
        for task in self._connecting.values():
            task.cancel()
        for connection in tuple(self._connections):
            connection._transport.abort()

    def _request(self, method: bytes, path: bytes, body: bytes, headers: bytes) -> bytes:
        head = self._posts.get(path) if method == b"POST" and not headers else None
        if head is None:
            head = self._head(method, path, headers, with_type=bool(body))
            if method == b"POST" and body and not headers and len(self._posts) < _KEPT_HEADS:
                self._posts[path] = head
        if body or method not in _USUALLY_WITHOUT_BODY:
            return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
        return head + b"\r\n"

    def _head(self, method: bytes, path: bytes, headers: bytes, *, with_type: bool) -> bytes:
        if not (method.isalpha() and _TARGET.fullmatch(path)):
            raise ValueError(f"not a request line: {method!r} {path!r}")
        lines = self._fixed
        if headers:
            lines += _checked(headers)
        if with_type and b"content-type:" not in headers.lower():
            lines += b"content-type: application/json\r\n"
        return b"%b %b%b HTTP/1.1\r\n%b" % (method, self._path, path, lines)

    def _connect(self, call: Call, request: bytes) -> None:
        if self._closed:
            self._loop.call_soon(call._fail, self._loop, Reason.CLOSED, "this pool is closed")
            return
        task = self._loop.create_task(self._open())
        self._connecting[call] = call._connecting = task
        task.add_done_callback(partial(self._connected, call, request))

    async def _open(self) -> _Connection:
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self, self._loop), self._host, self._port, ssl=self._ssl
            )
        return connection

    def _connected(self, call: Call, request: bytes, task: asyncio.Task[_Connection]) -> None:
        del self._connecting[call]
        call._connecting = None
        if task.cancelled():
            call._fail(self._loop, Reason.CLOSED, "this pool is closed")
        elif (error := task.exception()) is not None:
            late = isinstance(error, TimeoutError)
            reason = Reason.CONNECT_TIMEOUT if late else Reason.CONNECT
            call._fail(self._loop, reason, in_words(error))
        elif (connection := task.result()).closing:
            call._fail(self._loop, Reason.CLOSED, "closed as soon as it was open")
        elif call._over:
            self._park(connection)
        else:
            connection.send(call, request, reused=False)

    def _park(self, connection: _Connection) -> None:
        if self._closed or len(self._idle) >= self._max_idle:
            connection.drop()
            return
        self._idle[connection] = self._loop.time()
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(self._idle_s, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        now = self._loop.time()
        old = list(takewhile(lambda item: item[1] + self._idle_s <= now, self._idle.items()))
        for connection, _ in old:
            del self._idle[connection]
            connection.drop()
        if self._idle:
            next_s = next(iter(self._idle.values())) + self._idle_s
            self._sweeper = self._loop.call_at(max(next_s, now + _SWEEP_AT_LEAST_S), self._sweep)


def _checked(lines: bytes) -> bytes:
    if not _HEADER_LINES.fullmatch(lines):
        raise ValueError(f"not header lines that a caller may set: {lines!r}")
    return lines


def _parse(url: str) -> _Address:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"expected http(s)://host[:port][/path], got {url!r}")
    path = parts.path.rstrip("/")
    plain = _TARGET.fullmatch(f"/{parts.netloc}{path}".encode())
    if parts.query or parts.fragment or not plain:
        raise ValueError(
            f"a server's address has no query, fragment, blank or non-ASCII letter: {url!r}"
        )
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    return _Address(parts.hostname, port, parts.netloc, path, secure)


def _report(loop: asyncio.AbstractEventLoop, error: Exception) -> None:
    loop.call_exception_handler({"message": "a listener raised", "exception": error})
