"""The live backend against a scripted server: how an attempt's end is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from backends.exchange import Exchange, Timeline
from backends.http import Upstream
from backends.sglang import Patience, Sglang
from backends.transcript import Kind, Transcript
from backends.trouble import Trouble
from policies.events import (
    Dispatch,
    Event,
    Fail,
    Failed,
    Fault,
    Finished,
    Progress,
    Reason,
    Reject,
)
from policies.types import Role, Worker
from tests.backends.http_peers import CHUNKED_HEAD, Handler, Peer, Server, serving, turns
from tests.gateway.talk import online

TOKEN = b'data: {"text":" a","output_ids":[1],"meta_info":{"finish_reason":null}}\n\n'
LAST = (
    b'data: {"text":" a","output_ids":[1],'
    b'"meta_info":{"finish_reason":{"type":"stop"},"completion_tokens":1}}\n\n'
)
CHAT_LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\n'
DONE = b"data: [DONE]\n\n"
PATIENCE = Patience(first_token_online_s=2.0)


@dataclass
class Reader:
    """A client that keeps what it is told."""

    told: bytes = b""
    ends: list[str] = field(default_factory=list)

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        self.ends.append("answer")

    def begin(self) -> None: ...

    def write(self, piece: bytes) -> bool:
        self.told += piece
        return False

    def has_room(self) -> bool:
        return True

    def drop(self) -> None: ...

    def end(self) -> None:
        self.ends.append("end")

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None: ...


@dataclass
class Bench:
    backend: Sglang
    told: list[Event]

    def start(self, reader: Reader, *, attempt: int = 1, **more: Any) -> Exchange:
        job = online("a")
        values: dict[str, Any] = {
            "path": b"/generate",
            "dialect": "generate",
            "body": {"text": "hello", "stream": True},
            "first_token_timeout_s": PATIENCE.first_token_online_s,
        }
        exchange = Exchange(job_id=job.id, stream=True, client=reader, **(values | more))
        self.backend.open(exchange)
        self.backend.start(Dispatch(job, None, "u", attempt, Reason.LEAST_WORK))
        return exchange

    async def end(self, within_s: float = 10.0) -> Finished | Failed:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        while True:
            for event in self.told:
                if isinstance(event, Finished | Failed):
                    return event
            assert loop.time() < until_s, f"no end within {within_s} s"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def bench(*handlers: Handler) -> AsyncIterator[tuple[Bench, Server]]:
    loop, told = asyncio.get_running_loop(), list[Event]()
    async with serving(*handlers) as server:
        backend = Sglang(loop, random.Random(0), PATIENCE, lambda worker, _: Upstream(worker.url))
        backend.connect(told.append)
        backend.add(Worker(name="u", url=server.url, role=Role.UNIFIED))
        yield Bench(backend, told), server
        backend.close()
        await turns()


def says(*events: bytes) -> Handler:
    """Streams these and then resets the connection: no end of the answer is to be seen."""

    async def handler(peer: Peer) -> None:
        chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
        await peer.answer(CHUNKED_HEAD, *chunks)
        await asyncio.sleep(0.1)
        peer.reset()

    return handler


@pytest.mark.parametrize("last", [(LAST,), (LAST, DONE)])
async def test_an_answer_that_was_complete_when_its_server_died_is_no_failure(
    last: tuple[bytes, ...],
) -> None:
    async with bench(says(TOKEN, *last)) as (bench_, _):
        reader = Reader()
        bench_.start(reader)
        assert isinstance(await bench_.end(), Finished)
        assert (reader.told, reader.ends) == (TOKEN + LAST + DONE, ["end"])


async def test_a_usage_chunk_after_the_finish_reason_hides_no_end() -> None:
    async with bench(says(TOKEN, CHAT_LAST, USAGE, DONE)) as (bench_, _):
        reader = Reader()
        bench_.start(reader, path=b"/v1/chat/completions", dialect="chat")
        assert isinstance(await bench_.end(), Finished)
        assert reader.told.endswith(USAGE + DONE)


async def test_an_answer_that_was_not_complete_when_its_server_died_is_one() -> None:
    async with bench(says(TOKEN)) as (bench_, _):
        bench_.start(Reader())
        failed = await bench_.end()
        assert isinstance(failed, Failed)
        assert (failed.fault, failed.blamed) == (Fault.DIED, ("u",))


def many(total: int, ids: str) -> bytes:
    """An event with several tokens, as a server that speculates sends them."""
    event = f'{{"text":" a b","output_ids":[{ids}],"meta_info":{{"finish_reason":null,'
    return f'data: {event}"completion_tokens":{total}}}}}\n\n'.encode()


async def test_tokens_are_those_of_the_server_where_its_events_tell_them() -> None:
    async def speaks(peer: Peer) -> None:
        chunks = [many(3, "1,2,3"), many(8, "4,5,6,7,8")]
        await peer.answer(CHUNKED_HEAD, *(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks))
        await asyncio.sleep(0.3)
        peer.reset()

    async with bench(speaks) as (bench_, _):
        bench_.start(Reader(), transcript=Transcript(Kind.INCREMENTAL))
        failed = await bench_.end()
        progress = [event for event in bench_.told if isinstance(event, Progress)]
        assert progress[-1].tokens == (("a", 8),)
        assert isinstance(failed, Failed)
        assert failed.generated == 8


@pytest.mark.parametrize("tokens", [b'{"tokens": 3}', b'{"tokens": null}', b"[]", b"no"])
async def test_a_tokenizer_that_answers_no_list_of_ids_ends_the_attempt_at_once(
    tokens: bytes,
) -> None:
    async def tokenize(peer: Peer) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(tokens)
        await peer.answer(head + tokens)

    async with bench(tokenize) as (bench_, _):
        now_s = asyncio.get_running_loop().time()
        begun(bench_)
        failed = await bench_.end(within_s=1.0)
        assert isinstance(failed, Failed)
        assert (failed.fault, failed.blamed) == (Fault.ENGINE, ("u",))
        assert asyncio.get_running_loop().time() - now_s < 1.0


async def test_a_tokenizer_that_hangs_is_hung_up_on() -> None:
    hung_up = asyncio.Event()

    async def silence(peer: Peer) -> None:
        await peer.request()
        if await peer.gone():
            hung_up.set()

    async with bench(silence) as (bench_, _):
        begun(bench_)
        failed = await bench_.end()
        assert isinstance(failed, Failed)
        assert failed.fault is Fault.TIMEOUT
        async with asyncio.timeout(1.0):
            await hung_up.wait()


def begun(bench_: Bench) -> None:
    """A second attempt at a stream whose client has had its first token."""
    transcript = Transcript()
    transcript.feed(TOKEN)
    bench_.start(Reader(), attempt=2, transcript=transcript, timeline=Timeline(first_token_us=1))
