"""A gateway with the Batch API on, and OpenAI's own client in front of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import openai
import orjson
from openai.types import Batch
from structlog.testing import capture_logs

from gateway.app import Gateway
from gateway.batch.service import Service
from gateway.batch.settings import BatchSettings
from gateway.clock import LiveClock
from gateway.config import Config, Key, Server

T = TypeVar("T")

ENDPOINT: Final = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class Served:
    gateway: Gateway
    http: aiohttp.ClientSession
    folder: Path
    stack: AsyncExitStack

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    def client(self, key: str = "none") -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        self.stack.push_async_callback(client.close)
        return client

    @property
    def service(self) -> Service:
        assert isinstance(self.gateway.batches, Service)
        return self.gateway.batches

    def stored(self) -> list[str]:
        """Blobs on the disk."""
        return sorted(path.name for path in (self.folder / "files").iterdir())

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """The status, and the body as JSON."""
        async with self.http.request(method, self.url + path, **more) as response:
            return response.status, orjson.loads(await response.read())

    async def until(self, holds: Callable[[], Awaitable[T | None]], within_s: float = 10.0) -> T:
        async with asyncio.timeout(within_s):
            while True:
                if found := await holds():
                    return found
                await asyncio.sleep(0.02)

    async def ended(self, client: openai.AsyncOpenAI, batch_id: str) -> Batch:
        """The batch, once nothing more becomes of it."""

        async def look() -> Batch | None:
            batch = await client.batches.retrieve(batch_id)
            return batch if batch.status in ENDED else None

        return await self.until(look)


def row(number: int, **more: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": f"Say {number}"}]}
    fields = {"custom_id": f"row-{number}", "method": "POST", "url": ENDPOINT, "body": body}
    return fields | more


def jsonl(*rows: Any) -> bytes:
    return b"".join(orjson.dumps(one) + b"\n" for one in rows)


@asynccontextmanager
async def served(
    folder: Path, *keys: Key, body_timeout_s: float = 5.0, **settings: Any
) -> AsyncIterator[Served]:
    config = Config(
        server=Server(port=0, body_timeout_s=body_timeout_s),
        key=keys,
        batch=replace(BatchSettings(folder=str(folder)), **settings),
    )
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        http = await stack.enter_async_context(aiohttp.ClientSession())
        stack.enter_context(capture_logs())
        clock = LiveClock(asyncio.get_running_loop())
        gateway = Gateway(config, clock, random.Random(7), tasks, lambda line: None)
        site = Served(gateway, http, folder, stack)
        site.service._make_runner = None  # its rows are run by hand
        await gateway.start()
        stack.push_async_callback(gateway.close)
        yield site
