"""Whether the gateway can listen where it is told to, and in which words it says that it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from backends.words import in_words
from gateway.config import ConfigError, Server


@contextmanager
def listening(server: Server) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot listen on {server.host}:{server.port}: {in_words(error)}"
        raise ConfigError(problem) from None


async def try_to_listen(server: Server) -> None:
    """For those who have much to do before the gateway starts: a taken address is told at once."""
    with listening(server):
        loop = asyncio.get_running_loop()
        trial = await loop.create_server(asyncio.Protocol, server.host, server.port)
        trial.close()
        await trial.wait_closed()
