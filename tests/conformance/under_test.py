"""What the conformance suite asks of a fleet, and the HTTP by which it asks."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import aiohttp

CHUNK_TOKENS = 1024
"""The prefill server's chunk."""
CONTEXT_TOKENS = 16_384
KV_TOKENS = 65_536
UNIFIED_RUNNING = 4
UNIFIED_QUEUED = 2
RELAXED_RUNNING = 4
"""The second decode server's slots; it streams incrementally."""
RENDEZVOUS_TIMEOUT_S = 8
"""How long a leg waits for its peer."""
HEARTBEAT_S = 2
MISSED_HEARTBEATS = 3
"""So many in a row, and a decode server knows that its prefill server is dead."""
SLOW_S = 0.02
"""A step's floor where a test must act in the middle of one request."""


class FleetUnderTest(Protocol):
    """One prefill, two decode and one unified server; addresses are URLs without a path."""

    prefill: str
    decode: str
    relaxed: str
    unified: str

    def bootstrap_port(self, url: str) -> int: ...

    async def kill(self, url: str) -> None: ...

    async def start(self, url: str) -> None:
        """Until the server is ready again."""


@dataclass(slots=True)
class Leg:
    """One request as its client sees it, while it runs and after."""

    task: asyncio.Task[None]
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    """Whether the stream ended with [DONE]."""
    broken: str = ""
    body: Any = None
    """What an unstreamed request got."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last(self) -> dict[str, Any]:
        return self.chunks[-1] if self.chunks else self.body

    @property
    def ids(self) -> list[int]:
        """All generated ids, from a cumulative stream or an incremental one."""
        if not self.chunks:
            return list(self.body["output_ids"])
        lists = [chunk["output_ids"] for chunk in self.chunks]
        if len(lists[-1]) == self.meta["completion_tokens"]:
            return list(lists[-1])
        return [token for ids in lists for token in ids]

    @property
    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = self.last["meta_info"]
        return meta

    @property
    def finish(self) -> dict[str, Any]:
        """The finish reason, or for an error told in other words the same shape."""
        if "error" in (self.chunks[-1] if self.chunks else {}):
            error = self.chunks[-1]["error"]
            return {
                "type": "abort",
                "message": error["message"],
                "status_code": error.get("status"),
            }
        if self.broken:
            return {"type": "broken", "message": self.broken, "status_code": None}
        if self.status != 200:
            error = self.body.get("error", self.body)
            message = error.get("message") if isinstance(error, dict) else error
            return {"type": "abort", "message": message, "status_code": self.status}
        reason: dict[str, Any] = self.meta["finish_reason"]
        return reason


class Client:
    """Requests against any server of a fleet; every leg ends with the client."""

    def __init__(self, http: aiohttp.ClientSession, fleet: FleetUnderTest, seed: int) -> None:
        self.http = http
        self.fleet = fleet
        self.rng = random.Random(seed)
        self.legs: list[Leg] = []

    def prompt(self, tokens: int) -> list[int]:
        return [self.rng.randint(20, 1000) for _ in range(tokens)]

    def rid(self) -> str:
        return f"{self.rng.getrandbits(128):032x}"

    def meeting(self, prefill: str | None = None) -> dict[str, Any]:
        """The fields by which two legs find each other."""
        return {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.fleet.bootstrap_port(prefill or self.fleet.prefill),
            "bootstrap_room": self.rng.randrange(1, 1 << 62),
        }

    def generate(
        self,
        url: str,
        ids: list[int],
        tokens: int,
        *,
        stream: bool = True,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Leg:
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": stream, **more}
        return self.send(url + "/generate", body, headers)

    def chat(
        self,
        url: str,
        content: str,
        tokens: int,
        *,
        stream: bool = True,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Leg:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **more,
        }
        return self.send(url + "/v1/chat/completions", body, headers)

    def pair(
        self,
        ids: list[int],
        tokens: int,
        *,
        prefill: str | None = None,
        decode: str | None = None,
        **more: Any,
    ) -> tuple[Leg, Leg]:
        """The same request to a prefill and a decode server, at once."""
        both = {"rid": self.rid(), **self.meeting(prefill), **more}
        return (
            self.generate(prefill or self.fleet.prefill, ids, tokens, **both),
            self.generate(decode or self.fleet.decode, ids, tokens, **both),
        )

    async def paired(self, ids: list[int], tokens: int, **more: Any) -> tuple[Leg, Leg]:
        legs = self.pair(ids, tokens, **more)
        await asyncio.gather(*(leg.task for leg in legs))
        return legs

    async def generated(self, url: str, ids: list[int], tokens: int, **more: Any) -> Leg:
        leg = self.generate(url, ids, tokens, **more)
        await leg.task
        return leg

    def send(self, url: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> Leg:
        leg = Leg(task=asyncio.create_task(asyncio.sleep(0)))
        leg.task = asyncio.create_task(self._run(leg, url, body, headers))
        self.legs.append(leg)
        return leg

    async def _run(
        self, leg: Leg, url: str, body: dict[str, Any], headers: Mapping[str, str] | None
    ) -> None:
        try:
            async with self.http.post(url, json=body, headers=headers) as answer:
                leg.status, leg.headers = answer.status, answer.headers
                if "text/event-stream" not in answer.content_type:
                    leg.body = json.loads(await answer.read())
                    return
                async for line in answer.content:
                    self._hear(leg, line.strip())
        except (aiohttp.ClientError, ConnectionError) as error:
            leg.broken = repr(error)
        finally:
            leg.begun.set()

    def _hear(self, leg: Leg, line: bytes) -> None:
        if line == b"data: [DONE]":
            leg.done = True
        elif line.startswith(b"data: "):
            leg.chunks.append(json.loads(line[6:]))
            leg.begun.set()

    async def abort(self, url: str, rid: str) -> tuple[int, bytes]:
        async with self.http.post(url + "/abort_request", json={"rid": rid}) as answer:
            return answer.status, await answer.read()

    async def get(self, url: str) -> tuple[int, Any]:
        async with self.http.get(url) as answer:
            told = await answer.read()
            return answer.status, json.loads(told) if told[:1] in (b"{", b"[") else told.decode()

    async def post(self, url: str, body: object) -> tuple[int, Any]:
        async with self.http.post(url, json=body) as answer:
            told = await answer.read()
            return answer.status, json.loads(told) if told[:1] in (b"{", b"[") else told.decode()

    async def loads(self, url: str) -> dict[str, Any]:
        _, answer = await self.get(url + "/v1/loads")
        load: dict[str, Any] = answer["loads"][0]
        return load

    async def slow(self, url: str, step_s: float | None) -> None:
        await self.post(url + "/slow_down", {"forward_sleep_time": step_s})

    async def step_s(self, url: str, tokens: int = 20) -> float:
        """A decode step's time: the median between a lone request's tokens."""
        leg = self.generate(url, self.prompt(30), tokens)
        came_s: list[float] = []
        while not leg.task.done():
            if len(leg.chunks) > len(came_s):
                came_s += [time.perf_counter()] * (len(leg.chunks) - len(came_s))
            await asyncio.sleep(0.001)
        return median(after - before for before, after in pairwise(came_s))

    async def until(
        self,
        url: str,
        holds: Callable[[dict[str, Any]], bool],
        within_s: float = 15.0,
        every_s: float = 0.02,
    ) -> dict[str, Any]:
        """The first load report that satisfies the condition."""
        load: dict[str, Any] = await until(lambda: self.loads(url), holds, within_s, every_s)
        return load

    async def idle(self, url: str) -> dict[str, Any]:
        return await self.until(url, is_idle)

    async def close(self) -> None:
        for leg in self.legs:
            leg.task.cancel()
        await asyncio.gather(*(leg.task for leg in self.legs), return_exceptions=True)


@asynccontextmanager
async def talking(fleet: FleetUnderTest, seed: int) -> AsyncIterator[Client]:
    """Afterwards every server is idle again; the seed keeps prompts out of other tests' caches."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        client = Client(http, fleet, seed)
        try:
            yield client
        finally:
            await client.close()
            for url in (fleet.prefill, fleet.decode, fleet.relaxed, fleet.unified):
                await client.idle(url)


def is_idle(load: dict[str, Any]) -> bool:
    """A prompt whose chunks are being prefilled counts as uncached tokens only."""
    queued = [count for name, count in load["disaggregation"].items() if "queue_reqs" in name]
    counts = ("num_running_reqs", "num_waiting_reqs", "num_waiting_uncached_tokens")
    return not any(load[name] for name in counts) and not any(queued)


async def until(
    look: Callable[[], Awaitable[Any]],
    holds: Callable[[Any], bool],
    within_s: float = 15.0,
    every_s: float = 0.02,
) -> Any:
    async with asyncio.timeout(within_s):
        while not holds(seen := await look()):  # noqa: ASYNC110 - a server does not call back
            await asyncio.sleep(every_s)
    return seen
