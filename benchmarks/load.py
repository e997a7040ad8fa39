"""A closed loop of clients that trusts no answer: what is not whole and exact is an error.

Used as a library (`await apply(Load(...))`) or as a command. An answer counts only with status 200,
all its tokens, `[DONE]` where it is streamed, and the end that HTTP gives it. Times are taken when
bytes arrive, before anything is parsed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
import urllib.parse
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

import httptools
import orjson
import uvloop

from benchmarks.processes import raise_file_limit, usage_of
from benchmarks.sse import DONE, MODEL, TOKEN_MARK, Shape

EVENT_END = b"\n\n"
ERROR_EVENT = b'data: {"error"'
SETTLE_S = 1.0


class Flaw(StrEnum):
    """What was wrong with an answer."""

    CONNECT = "cannot connect"
    STATUS = "status"
    CUT = "connection closed inside an answer"
    NO_DONE = "stream without [DONE]"
    IN_BAND = "error inside a stream"
    COUNT = "wrong number of tokens"
    GARBLED = "not HTTP, or not JSON"
    TIMEOUT = "no end in time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """N clients, each with one request at a time, until `requests` have been sent in all."""

    url: str
    clients: int
    requests: int
    tokens: int = 64
    stream: bool = True
    shape: Shape = Shape.CHAT
    prompt_chars: int = 512
    headers: tuple[tuple[str, str], ...] = ()
    spread_s: float = 0.0
    """Clients begin evenly over this time: users do not arrive in one instant."""
    patience_s: float = 60.0
    """When this is over, whatever is still open counts as an error."""

    @property
    def address(self) -> tuple[str, int]:
        parts = urllib.parse.urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def body(self) -> dict[str, Any]:
        prompt = "x " * (self.prompt_chars // 2)
        if self.shape is Shape.GENERATE:
            parameters = {"max_new_tokens": self.tokens, "ignore_eos": True}
            return {"text": prompt, "sampling_params": parameters, "stream": self.stream}
        said = {"messages": [{"role": "user", "content": prompt}]}
        asked = said if self.shape is Shape.CHAT else {"prompt": prompt}
        return {"model": MODEL, **asked, "max_tokens": self.tokens, "stream": self.stream}

    def wire(self) -> bytes:
        body = orjson.dumps(self.body())
        lines = [
            f"POST {self.shape} HTTP/1.1",
            f"host: {self.address[0]}:{self.address[1]}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(slots=True)
class Outcome:
    """What the clients saw; times in seconds, one value per answer or per gap."""

    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    whole_s: array[float] = field(default_factory=lambda: array("d"))
    tokens: int = 0
    answered: int = 0
    wall_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return self.errors.total()

    def take(self, answer: Answer, tokens: int, ended_at: float) -> None:
        self.answered += 1
        self.tokens += tokens
        self.ttft_s.append((answer.first_at or ended_at) - answer.sent_at)
        self.whole_s.append(ended_at - answer.sent_at)


def quantile(values: array[float], share: float) -> float | None:
    """The nearest rank; nothing measured is None, never zero."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


class Answer:
    """One answer as it arrives, and the verdict on it."""

    __slots__ = ("body", "done", "error", "first_at", "last_at", "sent_at", "status", "tail")

    def __init__(self, sent_at: float) -> None:
        self.sent_at = sent_at
        self.first_at = self.last_at = 0.0
        self.status = 0
        self.done = self.error = False
        self.tail = b""
        self.body: list[bytes] = []

    def new_tokens(self, data: bytes) -> int:
        """Tokens in all events that are complete now; the start of a cut one waits for its end."""
        data = self.tail + data if self.tail else data
        end = data.rfind(EVENT_END)
        if end + len(EVENT_END) == len(data):
            self.tail = b""
        else:
            cut = end + len(EVENT_END) if end >= 0 else 0
            data, self.tail = data[:cut], data[cut:]
        self.done = self.done or DONE in data
        self.error = self.error or ERROR_EVENT in data
        return data.count(TOKEN_MARK)


class Client(asyncio.Protocol):
    """One connection, used for one request after another."""

    transport: asyncio.Transport
    parser: httptools.HttpResponseParser

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.answer: Answer | None = None
        self.verdict: asyncio.Future[str] | None = None
        self.tokens = 0
        self.alive = False
        self.read_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.alive = True
        self.clients.connected.add(self)

    def ask(self, request: bytes) -> asyncio.Future[str]:
        """Resolves to what was wrong with the answer, or to nothing."""
        self.verdict = self.clients.loop.create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.answer, self.tokens = Answer(self.clients.now()), 0
        self.transport.write(request)
        return self.verdict

    def data_received(self, data: bytes) -> None:
        self.read_at = self.clients.now()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.end(Flaw.GARBLED)
            self.close()

    def on_headers_complete(self) -> None:
        if self.answer is not None:
            self.answer.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        answer = self.answer
        if answer is None:
            return
        if answer.status != 200 or not self.clients.load.stream:
            answer.body.append(data)
        elif new := answer.new_tokens(data):
            self.count(answer, new)

    def count(self, answer: Answer, new: int) -> None:
        gaps = self.clients.outcome.gaps_s
        if self.tokens:
            gaps.append(self.read_at - answer.last_at)
        else:
            answer.first_at = self.read_at
            self.clients.opened()
        for _ in range(new - 1):
            gaps.append(0.0)
        answer.last_at = self.read_at
        self.tokens += new

    def on_message_complete(self) -> None:
        if self.answer is not None:
            keep = self.parser.should_keep_alive()
            self.end(self.flaw(self.answer))
            if not keep:
                self.close()

    def close(self) -> None:
        self.alive = False
        self.answer = None
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        self.clients.connected.discard(self)
        self.end(Flaw.CUT)

    def flaw(self, answer: Answer) -> str:
        if answer.status != 200:
            return f"{Flaw.STATUS} {answer.status}"
        if not self.clients.load.stream:
            return self.whole_flaw(b"".join(answer.body))
        if answer.error:
            return Flaw.IN_BAND
        if not answer.done or answer.tail:
            return Flaw.NO_DONE
        return "" if self.tokens == self.clients.load.tokens else Flaw.COUNT

    def whole_flaw(self, body: bytes) -> str:
        try:
            told, text = told_and_text(self.clients.load.shape, orjson.loads(body))
        except (ValueError, TypeError, LookupError):
            return Flaw.GARBLED
        self.tokens = text.count("tok")
        return "" if self.tokens == told == self.clients.load.tokens else Flaw.COUNT

    def end(self, flaw: str) -> None:
        answer, self.answer = self.answer, None
        if answer is None or self.verdict is None:
            return
        if not flaw:
            self.clients.outcome.take(answer, self.tokens, self.read_at)
        if not self.verdict.done():
            self.verdict.set_result(flaw)


def told_and_text(shape: Shape, body: dict[str, Any]) -> tuple[int, str]:
    """How many tokens the answer says it has, and its text, which must have as many."""
    if shape is Shape.GENERATE:
        return body["meta_info"]["completion_tokens"], body["text"]
    choice = body["choices"][0]
    text = choice["message"]["content"] if shape is Shape.CHAT else choice["text"]
    return body["usage"]["completion_tokens"], text


class Clients:
    """All clients of one load, and what they have seen so far."""

    def __init__(self, load: Load, now: Callable[[], float] = time.perf_counter) -> None:
        self.load, self.now = load, now
        self.loop = asyncio.get_running_loop()
        self.outcome = Outcome()
        self.unsent = load.requests
        self.unopened = load.clients
        self.all_open = asyncio.Event()
        self.connected: set[Client] = set()
        self.request = load.wire()

    def opened(self) -> None:
        self.unopened -= 1
        if self.unopened == 0:
            self.all_open.set()

    async def run(self) -> Outcome:
        began = self.now()
        try:
            async with asyncio.timeout(self.load.patience_s), asyncio.TaskGroup() as group:
                for index in range(self.load.clients):
                    group.create_task(self.one(self.load.spread_s * index / self.load.clients))
        except TimeoutError:
            lost = self.load.requests - self.outcome.answered - self.outcome.failed
            self.outcome.errors[Flaw.TIMEOUT] += lost
        finally:
            for client in tuple(self.connected):
                client.close()
        self.outcome.wall_s = self.now() - began
        return self.outcome

    async def one(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        client: Client | None = None
        while self.unsent > 0:
            self.unsent -= 1
            client = await self.one_request(client)

    async def one_request(self, client: Client | None) -> Client | None:
        try:
            if client is None or not client.alive:
                _, client = await self.loop.create_connection(
                    lambda: Client(self), *self.load.address
                )
        except OSError:
            self.outcome.errors[Flaw.CONNECT] += 1
            return None
        flaw = await client.ask(self.request)
        if flaw:
            self.outcome.errors[flaw] += 1
        return client


async def apply(load: Load, now: Callable[[], float] = time.perf_counter) -> Outcome:
    return await Clients(load, now).run()


async def hold(load: Load, measure: Callable[[], float]) -> tuple[Outcome, float | None]:
    """Open every stream, measure while all of them are open, then walk away from them."""
    clients = Clients(load)
    measured = None
    async with asyncio.TaskGroup() as group:
        running = group.create_task(clients.run())
        opening = group.create_task(clients.all_open.wait())
        await asyncio.wait((running, opening), return_when=asyncio.FIRST_COMPLETED)
        if clients.all_open.is_set():
            await asyncio.sleep(SETTLE_S)
            measured = measure()
        opening.cancel()
        running.cancel()
    return clients.outcome, measured


def summary(outcome: Outcome) -> dict[str, Any]:
    """Latencies in milliseconds; what was not measured is null."""

    def ms(values: array[float], share: float) -> float | None:
        found = quantile(values, share)
        return None if found is None else round(found * 1000, 3)

    return {
        "answered": outcome.answered,
        "failed": outcome.failed,
        "errors": {str(flaw): count for flaw, count in outcome.errors.items()},
        "tokens": outcome.tokens,
        "wall_s": round(outcome.wall_s, 3),
        "ttft_ms_p50": ms(outcome.ttft_s, 0.5),
        "ttft_ms_p99": ms(outcome.ttft_s, 0.99),
        "itl_ms_p50": ms(outcome.gaps_s, 0.5),
        "itl_ms_p99": ms(outcome.gaps_s, 0.99),
        "whole_ms_p50": ms(outcome.whole_s, 0.5),
        "whole_ms_p99": ms(outcome.whole_s, 0.99),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The exit code is 1 when any answer was wrong.\n"
        "example: python -m benchmarks.load http://127.0.0.1:30000 --clients 64 --requests 256",
    )
    parser.add_argument("url", help="a bare worker, or anything in front of bare workers")
    parser.add_argument("--shape", type=Shape, choices=list(Shape), default=Shape.CHAT)
    parser.add_argument("--clients", type=int, default=64, help="how many ask at the same time")
    parser.add_argument("--requests", type=int, default=256, help="how many are sent in all")
    parser.add_argument("--tokens", type=int, default=64, help="asked and checked in each answer")
    parser.add_argument("--unary", action="store_true", help="ask for whole answers, not streams")
    parser.add_argument("--spread-s", type=float, default=0.0, help="let clients begin over time")
    parser.add_argument("--patience-s", type=float, default=60.0, help="give up after this time")
    parser.add_argument("--pid", type=int, help="also say what CPU this process tree used")
    return parser.parse_args()


def main() -> int:
    asked = parsed()
    raise_file_limit()
    load = Load(
        url=asked.url,
        clients=asked.clients,
        requests=asked.requests,
        tokens=asked.tokens,
        stream=not asked.unary,
        shape=asked.shape,
        spread_s=asked.spread_s,
        patience_s=asked.patience_s,
    )
    gc.freeze()
    before = usage_of(asked.pid) if asked.pid else None
    outcome = uvloop.run(apply(load))
    found = summary(outcome)
    if before is not None:
        found["cpu_s"] = round(usage_of(asked.pid).cpu_s - before.cpu_s, 4)
    print(orjson.dumps(found).decode())
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
