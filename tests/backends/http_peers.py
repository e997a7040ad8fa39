"""Scripted servers, and a listener that writes down what it hears."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from backends.http import Call, HttpError, Reason, Upstream
from tests.virtual_loop import VirtualTimeLoop

Handler = Callable[["Peer"], Awaitable[None]]

SHORT = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNKED = CHUNKED_HEAD + b"5\r\nhello\r\n7\r\n, world\r\n0\r\n\r\n"


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[bytes, bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        _, found, length = head.partition(b"content-length: ")
        return head, await self.reader.readexactly(int(length.split()[0]) if found else 0)

    async def answer(self, *parts: bytes) -> tuple[bytes, bytes]:
        asked = await self.request()
        await self.write(*parts)
        return asked

    async def write(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await turns()

    async def gone(self) -> bool:
        """Waits until the client has closed."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    def reset(self) -> None:
        linger_not_at_all = struct.pack("ii", 1, 0)
        made = self.writer.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not_at_all)
        self.writer.transport.abort()


class Server:
    """Runs one handler for each connection and keeps what went wrong in any."""

    def __init__(self, *handlers: Handler) -> None:
        self.handlers = list(handlers)
        self.connections = 0
        self.url = ""
        self.tasks: list[asyncio.Task[None]] = []

    def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = self.handlers[min(self.connections, len(self.handlers) - 1)]
        self.connections += 1
        self.tasks.append(asyncio.create_task(self.run(handler, Peer(reader, writer))))

    async def run(self, handler: Handler, peer: Peer) -> None:
        try:
            await handler(peer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            peer.writer.close()


@asynccontextmanager
async def serving(*handlers: Handler, **options: Any) -> AsyncIterator[Server]:
    server = Server(*handlers)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, **options)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)


@asynccontextmanager
async def pool(server: Server | str, **options: Any) -> AsyncIterator[Upstream]:
    upstream = Upstream(server if isinstance(server, str) else server.url, **options)
    yield upstream
    upstream.close()
    await turns()
    assert (upstream.open, upstream.idle) == (0, 0)


class Heard:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.pieces: list[bytes] = []
        self.status = 0
        self.error: HttpError | None = None
        self.over = asyncio.Event()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def on_head(self, status: int) -> None:
        self.events.append("head")
        self.status = status

    def on_body(self, piece: bytes) -> None:
        self.events.append("body")
        self.pieces.append(piece)

    def on_end(self) -> None:
        self.events.append("end")
        self.over.set()

    def on_error(self, error: HttpError) -> None:
        self.events.append("error")
        self.error = error
        self.over.set()

    def failure(self) -> tuple[Reason, bool]:
        assert self.error is not None
        return self.error.reason, self.error.before_head


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await turns()


def get(upstream: Upstream, listener: Heard, path: bytes = b"/") -> Call:
    return upstream.send(b"GET", path, b"", listener)


async def ask(upstream: Upstream, method: bytes = b"GET", body: bytes = b"") -> Heard:
    heard = Heard()
    upstream.send(method, b"/", body, heard)
    await heard.over.wait()
    return heard


def saying(*parts: bytes) -> Handler:
    """Answers every request on a connection with the same bytes."""

    async def handler(peer: Peer) -> None:
        while True:
            await peer.answer(*parts)

    return handler


def saying_and_closing(*parts: bytes) -> Handler:
    async def handler(peer: Peer) -> None:
        await peer.answer(*parts)

    return handler


async def silent(peer: Peer) -> None:
    await peer.gone()


def asyncio_run(main: Any) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main)
