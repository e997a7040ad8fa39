"""`python -m benchmarks.batch_load`: work that goes on until it is ended, in a process of its own.

It steps back behind everything else (nice 19): on one machine with the gateway it would otherwise
take the processor that a client elsewhere has for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop

from benchmarks.batch_site import CHAT, becomes
from gateway.batch.client import BatchClient

WINDOW = "3650d"
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


async def upload(url: str, file: Path, *, validates: bool) -> None:
    """A file is uploaded again and again. A batch that is made of it has all the time there is: no
    row of it runs before it is cancelled, where another batch waits."""
    loop = asyncio.get_running_loop()
    async with BatchClient.connected(url, "") as client:
        while True:
            began_s = loop.time()
            stored = await client.upload(file, lambda _: None)
            print(f"{loop.time() - began_s:.2f}", flush=True)
            if validates:
                batch = await client.create(stored["id"], CHAT, WINDOW, {})
                await becomes(client, batch["id"], ("in_progress",))
                await client.cancel(batch["id"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.batch_load", description=__doc__)
    parser.add_argument("what", choices=("offline", "upload", "submit"))
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--at-once", type=int, default=16)
    given = parser.parse_args(arguments)
    os.nice(19)
    if given.what == "offline":
        uvloop.run(offline(given.url, given.file, given.at_once))
    else:
        uvloop.run(upload(given.url, given.file, validates=given.what == "submit"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
