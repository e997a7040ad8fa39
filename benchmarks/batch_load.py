"""`python -m benchmarks.batch_load`: work that goes on until it is ended, in a process of its own.

It steps back behind everything else (nice 19): on one machine with the gateway it would otherwise
take the processor that a client elsewhere has for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop

from benchmarks.batch_site import CHAT, becomes
from gateway.batch.client import BatchClient

OFFLINE = {"x-slackwater-class": "offline"}


def bodies_of(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line)["body"] for line in path.read_bytes().splitlines()]


async def offline(url: str, rows: Path, at_once: int) -> None:
    """The rows of a file as plain offline requests, so many of them at any time."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    bodies = cycle(bodies_of(rows))
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, headers=OFFLINE) as http,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(at_once):
            group.create_task(_one_after_another(http, url + CHAT, bodies))


async def _one_after_another(
    http: aiohttp.ClientSession, url: str, bodies: Iterator[dict[str, Any]]
) -> None:
    while True:
        async with http.post(url, json=next(bodies)) as response:
            await response.read()


async def uploads(url: str, file: Path) -> AsyncIterator[float]:
    """A file is uploaded and validated, and then again. Yields the seconds of each upload."""
    loop = asyncio.get_running_loop()
    async with BatchClient.connected(url, "") as client:
        while True:
            began_s = loop.time()
            stored = await client.upload(file, lambda _: None)
            yield loop.time() - began_s
            batch = await client.create(stored["id"], CHAT, "30d", {})
            await becomes(client, batch["id"], ("in_progress",))
            await client.cancel(batch["id"])


async def _upload(url: str, file: Path) -> None:
    async for seconds in uploads(url, file):
        print(f"{seconds:.2f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.batch_load", description=__doc__)
    parser.add_argument("what", choices=("offline", "upload"))
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--at-once", type=int, default=16)
    given = parser.parse_args(arguments)
    os.nice(19)
    if given.what == "offline":
        uvloop.run(offline(given.url, given.file, given.at_once))
    else:
        uvloop.run(_upload(given.url, given.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
