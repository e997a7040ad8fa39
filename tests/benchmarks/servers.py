"""A server that answers each request with the bytes it was given, and then keeps, cuts or hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import cast


class Then(StrEnum):
    KEEP = "keep"
    CLOSE = "close"
    HANG = "hang"


class Script(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, answers: list[bytes], then: Then) -> None:
        self.answers, self.then = answers, then

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        for piece in self.answers:
            self.transport.write(piece)
        if self.then is Then.CLOSE:
            self.transport.close()


@asynccontextmanager
async def scripted(*answers: bytes, then: Then = Then.KEEP) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Script([*answers], then), "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
