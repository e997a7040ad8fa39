"""A gateway in front of emulated servers on the virtual-time loop, and what its tests ask of it."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import aiohttp
from structlog.testing import capture_logs

from backends.actuators.relaunch import Relauncher
from backends.emulator import EmulatedFleet, EmulatedServer, Fault, FaultKind, ServerSpec
from backends.engine import EngineConfig
from backends.http import Call, Listener, Upstream
from gateway.app import Gateway
from gateway.config import Config, Retry, Server, Telemetry, Timeouts, WorkerEntry
from gateway.core import Core
from policies.types import Pool, Role

T = TypeVar("T")

RELEASED_WITHIN_S = 10.0
"""SGLang notices at a tick of 4 s that the client of a whole answer has left."""


def spec(name: str, role: Role, *, pool: Pool = Pool.STRICT, **more: Any) -> ServerSpec:
    face = {key: more.pop(key) for key in ("incremental", "speed") if key in more}
    return ServerSpec(engine=EngineConfig(name=name, role=role, **more), pool=pool, **face)


PAIR = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE))
TWO_PAIRS = (*PAIR, spec("p2", Role.PREFILL), spec("d2", Role.DECODE))
UNIFIED = (spec("u1", Role.UNIFIED),)

QUICK = Config(
    server=Server(port=0, header_timeout_s=5.0, body_timeout_s=5.0, drain_s=5.0),
    timeouts=Timeouts(
        connect_s=1.0,
        first_token_online_s=3.0,
        first_token_offline_s=6.0,
        between_tokens_s=2.0,
        total_s=60.0,
        client_stall_s=5.0,
    ),
    retry=Retry(),
    telemetry=Telemetry(poll_ms=500.0, timeout_ms=1000.0),
)
"""Short times, so that little virtual time has to pass."""


def entry_of(server: EmulatedServer, **more: Any) -> WorkerEntry:
    settings = server.spec.engine
    facts: dict[str, Any] = {
        "url": server.url,
        "name": server.name,
        "role": settings.role,
        "pool": server.spec.pool,
        "bootstrap_port": server.bootstrap_port,
    }
    return WorkerEntry(**facts | more)


def fault(kind: FaultKind, **more: Any) -> Fault:
    return Fault(kind=kind, **more)


@dataclass(frozen=True, slots=True)
class Sent:
    """One inference request as it went to a server."""

    worker: str
    path: str
    body: Mapping[str, Any]
    at_s: float


@dataclass(frozen=True, slots=True)
class Told:
    """What a client was answered."""

    status: int
    headers: Mapping[str, str]
    raw: bytes
    took_s: float

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    @property
    def code(self) -> str:
        return code_in(self.body)

    @property
    def events(self) -> list[Any]:
        return events_in(self.raw)


def code_in(body: Mapping[str, Any]) -> str:
    return str(body["error"]["code"])


def events_in(raw: bytes) -> list[Any]:
    """The data of each event, parsed; [DONE] and what is not JSON stay as they are."""
    found: list[Any] = []
    for line in raw.splitlines():
        if line.startswith(b"data: "):
            data = line[6:]
            try:
                found.append(json.loads(data))
            except ValueError:
                found.append(data.decode(errors="replace"))
    return found


@dataclass
class Site:
    """The gateway, the servers behind it and a client in front."""

    fleet: EmulatedFleet
    gateway: Gateway
    config: Config
    http: aiohttp.ClientSession
    lines: list[dict[str, Any]]
    """The log's lines about requests."""
    strangers: list[RawClient] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Every request to a server, by its name and the page."""
    complaints: list[str] = field(default_factory=list)
    """Everything that a log would show as an error: there must be none."""

    @property
    def core(self) -> Core:
        return self.gateway.core

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def hurt(self, name: str, kind: FaultKind, **more: Any) -> None:
        self.fleet[name].faults.add(fault(kind, **more))
        self.fleet[name].face.apply_slowness()

    def heal(self, name: str) -> None:
        self.fleet[name].faults.clear()
        self.fleet[name].face.apply_slowness()

    def sent_to(self, *names: str) -> list[Sent]:
        return [one for one in self.sent if one.worker in names]

    async def ask(
        self, path: str, body: Any, headers: Mapping[str, str] | None = None, method: str = "POST"
    ) -> Told:
        """One request and all of its answer, streamed or not."""
        began_s = self.now_s()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        async with self.http.request(method, self.url + path, data=data, headers=given) as response:
            raw = await response.read()
            return Told(response.status, response.headers, raw, self.now_s() - began_s)

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Told:
        return await self.ask(path, b"", headers, method="GET")

    def leftovers(self) -> list[str]:
        """Whatever is still held for a request that has ended."""
        gateway = self.gateway
        counts = {
            "requests in front": len(gateway.front),
            "jobs in the core": len(gateway.core),
            "attempts": len(gateway.backend),
            "busy connections": sum(
                len(server.upstream.busy) if isinstance(server.upstream, Spied) else 0
                for server in gateway.backend.servers()
            ),
        }
        left = [f"{count} {what}" for what, count in counts.items() if count]
        left += [repr(e) for e in gateway.core.ledgers.values() if not e.is_empty]
        left += [repr(e) for e in gateway.core.ledgers.values() if e.prefill_tokens]
        left += [f"{name}: {held}" for name, held in self.fleet.resident().items()]
        return left

    async def nothing_left(self, within_s: float = RELEASED_WITHIN_S) -> list[str]:
        """What is left once it has had that long to go away: nothing, one hopes."""
        until_s = self.now_s() + within_s
        while True:
            left = self.leftovers()
            if not left or self.now_s() >= until_s:
                return left
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def meanwhile(self, asking: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
        """Asks while the test goes on; what it has begun is ended with it."""
        task = asyncio.create_task(asking)
        try:
            yield task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, aiohttp.ClientError):
                await task

    async def until(self, what: str, holds: Callable[[], object], within_s: float = 20.0) -> None:
        until_s = self.now_s() + within_s
        while not holds():
            assert self.now_s() < until_s, f"not within {within_s} s: {what}"
            await asyncio.sleep(0.01)

    async def serves(self, within_s: float = 0.0) -> Told:
        """A plain request that must be served; with a time, it may be refused until then."""
        until_s = self.now_s() + within_s
        while True:
            told = await self.ask("/generate", generate(4))
            if told.status == 200 or self.now_s() >= until_s:
                assert told.status == 200, told.raw
                return told
            await asyncio.sleep(0.1)


class Spied(Upstream):
    """A server's connections, with a note of each inference request that goes there."""

    name = ""
    site: Site
    busy: set[Call]

    def send(
        self, method: bytes, path: bytes, body: bytes, listener: Listener, headers: bytes = b""
    ) -> Call:
        call = super().send(method, path, body, listener, headers)
        self.site.calls.append((self.name, path.decode().partition("?")[0]))
        if path.startswith((b"/generate", b"/v1/c", b"/v1/r", b"/v1/mess")):
            note = Sent(self.name, path.decode(), json.loads(body), self.site.now_s())
            self.site.sent.append(note)
            self.busy = {one for one in self.busy if not one._over} | {call}
        else:
            self.busy = {one for one in self.busy if not one._over}
        return call


def spy_on(gateway: Gateway, site: Site) -> None:
    """Each server's connections become spied ones; they stay what they are otherwise."""
    for server in gateway.backend.servers():
        upstream = server.upstream
        if not isinstance(upstream, Spied):
            upstream.__class__ = Spied
            assert isinstance(upstream, Spied)
            upstream.name, upstream.site, upstream.busy = server.name, site, set()


class _Complaints(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        self._found.append(text)


@asynccontextmanager
async def standing(
    specs: Sequence[ServerSpec] = PAIR,
    *,
    workers: Sequence[str] | None = None,
    entries: Mapping[str, Mapping[str, Any]] | None = None,
    relauncher: Callable[[EmulatedFleet], Relauncher] | None = None,
    idle_s: float = 0.01,
    **sections: Any,
) -> AsyncIterator[Site]:
    """A site that serves. Afterwards nothing may be left of any request, and nothing complained of.

    `sections` replace those of QUICK; `workers` names those that the gateway knows at first;
    `entries` holds more settings of some of them. The gateway has nothing to do for `idle_s`.
    """
    more = entries or {}
    loop = asyncio.get_running_loop()
    async with EmulatedFleet(specs) as fleet:
        known = [fleet[name] for name in (fleet.servers if workers is None else workers)]
        config = replace(
            QUICK, worker=tuple(entry_of(s, **more.get(s.name, {})) for s in known), **sections
        )
        async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as http:
            lines: list[dict[str, Any]] = []
            owner = None if relauncher is None else relauncher(fleet)
            gateway = Gateway(config, loop, random.Random(7), tasks, lines.append, fleet=owner)
            site = Site(fleet, gateway, config, http, lines)
            handler = _Complaints(site.complaints)
            loggers = [logging.getLogger(name) for name in ("slackwater.http", "asyncio")]
            for logger in loggers:
                logger.addHandler(handler)
            try:
                with capture_logs() as told:
                    await gateway.start()
                    spy_on(gateway, site)
                    await asyncio.sleep(idle_s)  # in timelines 0 stands for never
                    yield site
                    assert await site.nothing_left() == []
                site.complaints += [str(one) for one in told if one["log_level"] == "error"]
                assert site.complaints == []
            finally:
                for stranger in site.strangers:
                    stranger.vanish()
                for logger in loggers:
                    logger.removeHandler(handler)
                await gateway.close()


def generate(tokens: int = 8, *, text: str = "Once upon a time", **more: Any) -> dict[str, Any]:
    return {
        "text": text,
        "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True},
        **more,
    }


def chat(tokens: int = 8, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me a story"}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, **more}


def completion(tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, **more}


def anthropic(tokens: int = 8, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me a story"}]
    return {"model": "emulated", "messages": messages, "max_tokens": tokens, **more}


def responses(tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"input": "Tell me a story", "max_output_tokens": tokens, "ignore_eos": True, **more}


BODIES = {
    "/generate": generate,
    "/v1/chat/completions": chat,
    "/v1/completions": completion,
    "/v1/messages": anthropic,
    "/v1/responses": responses,
}

OFFLINE = {"x-slackwater-class": "offline"}


class RawClient:
    """A client that does what well-behaved ones do not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, site: Site, *, buffer_bytes: int | None = None) -> RawClient:
        plug = socket.socket()
        if buffer_bytes is not None:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        plug.settimeout(0.0)
        await asyncio.get_running_loop().sock_connect(plug, ("127.0.0.1", site.gateway.port))
        client = cls(*await asyncio.open_connection(sock=plug, limit=buffer_bytes or 2**16))
        site.strangers.append(client)
        return client

    def say(self, text: bytes) -> None:
        self.writer.write(text)

    def post(self, path: str, body: Any, *, version: str = "1.1", more: str = "") -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"{more}content-length: {len(data)}\r\n\r\n"
        self.say(head.encode(errors="surrogateescape") + data)

    async def rest(self, within_s: float = 30.0) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(within_s):
            with suppress(ConnectionError):
                return await self.reader.read()
            return b""

    async def head(self, within_s: float = 30.0) -> bytes:
        async with asyncio.timeout(within_s):
            return await self.reader.readuntil(b"\r\n\r\n")

    def vanish(self) -> None:
        self.writer.transport.abort()
