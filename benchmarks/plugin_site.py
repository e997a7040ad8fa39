"""A pair of real servers with the plug-in, and streams of which every token is timed."""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import aiohttp
import orjson
import zmq
import zmq.asyncio

from backends.engine_words import TOPIC, steps_of
from backends.fleet.fleet import Fleet
from backends.fleet.spec import FleetSpec, Group
from policies.step_line import SeenStep
from policies.types import Pool, Role
from tests.conformance.under_test import is_idle

CHUNK_TOKENS = 1024
KV_TOKENS = 65_536
QUEUED = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
}
"""Mooncake refuses more than 1,024 pieces at a time over TCP, and a prompt has hundreds where the
memory is in pieces; SGLang then takes the decode server for dead, and every request fails for
seconds."""
DRILL = {"SLACKWATER_PLUGIN_DRILL": "1"}
MODES = {"all": 0, "online-first": 1, "slack": 2}


@dataclass(slots=True)
class Stream:
    """One request and when each of its events came, with the tokens so far."""

    rid: str = ""
    limit: int = 0
    """Tokens that it asks for."""
    task: asyncio.Task[None] | None = None
    sent_s: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """What it has answered."""

    @property
    def ttft_ms(self) -> float:
        return (self.events[0][0] - self.sent_s) * 1e3

    @property
    def tpot_ms(self) -> float:
        (first_s, first), (last_s, last) = self.events[0], self.events[-1]
        return (last_s - first_s) * 1e3 / (last - first)

    @property
    def has_failed(self) -> bool:
        """Of one that has ended."""
        return not self.events or self.events[-1][1] < self.limit

    def tokens_between(self, from_s: float, until_s: float) -> int:
        return self.tokens_until(until_s) - self.tokens_until(from_s)

    def tokens_until(self, until_s: float) -> int:
        at = bisect_right(self.events, until_s, key=itemgetter(0))
        return self.events[at - 1][1] if at else 0


class Site:
    def __init__(self, fleet: Fleet, http: aiohttp.ClientSession, rng: random.Random) -> None:
        prefill, decode = fleet.servers
        self.prefill, self.decode = prefill.url, decode.url
        self._bootstrap_port = prefill.bootstrap_port
        self._http, self._rng = http, rng

    def prompt(self, tokens: int) -> list[int]:
        return [self._rng.randint(20, 1000) for _ in range(tokens)]

    def send(
        self,
        ids: list[int],
        tokens: int,
        *,
        offline: bool = False,
        tpot_ms: float = 0.0,
        **more: Any,
    ) -> Stream:
        told: dict[str, Any] = {"slackwater_class": "offline" if offline else "online"}
        if tpot_ms:
            told["slackwater_tpot_ms"] = tpot_ms
        rid = f"{self._rng.getrandbits(128):032x}"
        body = {
            "input_ids": ids,
            "sampling_params": {
                "max_new_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "custom_params": told,
            },
            "stream": True,
            "rid": rid,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self._bootstrap_port,
            "bootstrap_room": self._rng.getrandbits(62) + 1,
            **more,
        }
        stream = Stream(rid=rid, limit=tokens, sent_s=time.monotonic())
        stream.task = asyncio.create_task(self._both(stream, body))
        return stream

    async def _both(self, stream: Stream, body: dict[str, Any]) -> None:
        async with asyncio.TaskGroup() as legs:
            legs.create_task(self._leg(self.prefill, body, Stream()))
            legs.create_task(self._leg(self.decode, body, stream))

    async def _leg(self, url: str, body: dict[str, Any], stream: Stream) -> None:
        async with self._http.post(url + "/generate", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    told = orjson.loads(line[6:])
                    if "error" in told:
                        continue
                    stream.events.append((time.monotonic(), told["meta_info"]["completion_tokens"]))
                    stream.ids = told["output_ids"]

    async def over(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            if stream.task is not None:
                await stream.task

    async def begun(self, streams: Sequence[Stream]) -> None:
        while not all(stream.events for stream in streams):  # noqa: ASYNC110 - a state is looked at
            await asyncio.sleep(0.01)

    async def stop(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            if stream.task is not None:
                stream.task.cancel()
        await asyncio.gather(
            *(stream.task for stream in streams if stream.task), return_exceptions=True
        )
        await self.idle()

    async def abort(self, stream: Stream) -> None:
        """As a gateway takes back a request that is decoding; its answer so far stays with us."""
        async with self._http.post(self.decode + "/abort_request", json={"rid": stream.rid}):
            pass
        if stream.task is not None:
            await stream.task

    async def idle(self) -> None:
        for url in (self.prefill, self.decode):
            while True:
                async with self._http.get(url + "/v1/loads") as answer:
                    if is_idle((await answer.json())["loads"][0]):
                        break
                await asyncio.sleep(0.05)

    async def set(self, mode: str, **values: float) -> None:
        told = {"slackwater_mode": MODES[mode], "slackwater_lease_s": 0}
        told |= {f"slackwater_{name}": value for name, value in values.items()}  # type: ignore[misc]
        for url in (self.prefill, self.decode):
            body = {"server_args": told}
            async with self._http.post(url + "/set_internal_state", json=body) as answer:
                assert await answer.json() == [True]

    async def state(self, url: str = "") -> dict[str, Any]:
        async with self._http.get((url or self.decode) + "/server_info") as answer:
            state: dict[str, Any] = (await answer.json())["internal_states"][0]["slackwater"]
            return state

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[list[SeenStep]]:
        """The decode steps that are reported meanwhile."""
        seen: list[SeenStep] = []
        endpoint = (await self.state())["reports"]
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            socket.subscribe(TOPIC)
            task = asyncio.create_task(_heard(socket, seen))
            try:
                yield seen
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def _heard(socket: zmq.asyncio.Socket, seen: list[SeenStep]) -> None:
    while True:
        frames = await socket.recv_multipart()
        seen += steps_of(frames[2])


@asynccontextmanager
async def standing(model: str, seed: int, **held: float) -> AsyncIterator[Site]:
    """Settings of a drill hold the decode server's steps."""
    spec = FleetSpec(
        model=model,
        kv_tokens=KV_TOKENS,
        plugin=True,
        env=QUEUED | (DRILL if held else {}),
        flags=("--enable-priority-scheduling",),
        servers=(
            Group(role=Role.PREFILL, flags=("--chunked-prefill-size", str(CHUNK_TOKENS))),
            Group(role=Role.DECODE, pool=Pool.STRICT),
        ),
    )
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        Fleet(spec) as fleet,
        aiohttp.ClientSession(timeout=timeout, connector=connector) as http,
    ):
        site = Site(fleet, http, random.Random(seed))
        if held:
            await site.set("all", **held)
        yield site
