"""A bare SGLang-shaped worker: cheap enough that what is measured is the proxy in front of it.

One protocol object per connection and one timer per process: as in the engine, all streams of a
worker get their next token in the same decode step. The first token is not bound to a step, because
it comes with the prefill.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

import httptools
import orjson
import uvloop

from benchmarks.sse import HEAD_STREAM, MODEL, Shape, stream_steps, whole_body

DEFAULT_TOKENS = 64
MOST_TOKENS = 8192
KV_TOKENS = 500_000_000
MAX_RUNNING = 100_000


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When tokens come; a prefill server answers with its one token at `first_ms`."""

    first_ms: float = 0.0
    step_ms: float = 20.0

    def whole_s(self, tokens: int) -> float:
        return (self.first_ms + (tokens - 1) * self.step_ms) / 1000


@dataclass(slots=True)
class Books:
    requests: int = 0
    aborts: int = 0
    running: int = 0


class Stream:
    """One answer on its way: which steps it has, and the next one."""

    __slots__ = ("at", "connection", "steps")

    def __init__(self, connection: Connection, steps: tuple[bytes, ...]) -> None:
        self.connection, self.steps, self.at = connection, steps, 0


class Steps:
    """The decode loop: each tick writes one token to every stream that runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, step_s: float) -> None:
        self.loop, self.step_s = loop, step_s
        self.streams: list[Stream] = []
        self.timer: asyncio.TimerHandle | None = None
        self.index = 0

    def join(self, stream: Stream) -> None:
        """No earlier than half a step from now, so that the first gap is of a step's size."""
        self.loop.call_later(self.step_s / 2, self.enter, stream)

    def enter(self, stream: Stream) -> None:
        self.streams.append(stream)
        if self.timer is None:
            self.index = math.floor(self.loop.time() / self.step_s) + 1
            self.timer = self.loop.call_at(self.index * self.step_s, self.tick)

    def tick(self) -> None:
        self.streams = [stream for stream in self.streams if stream.connection.step(stream)]
        self.timer = None
        if self.streams:
            # A late tick is made up for by the next ones: the rate holds.
            self.index += 1
            self.timer = self.loop.call_at(self.index * self.step_s, self.tick)


@dataclass(slots=True)
class Worker:
    role: Role
    pace: Pace
    loop: asyncio.AbstractEventLoop
    steps: Steps
    books: Books = field(default_factory=Books)

    @classmethod
    def on(cls, loop: asyncio.AbstractEventLoop, role: Role, pace: Pace) -> Worker:
        return cls(role, pace, loop, Steps(loop, pace.step_ms / 1000))

    def information(self) -> dict[str, Any]:
        mode = "null" if self.role is Role.UNIFIED else self.role.value
        return {
            "model_path": MODEL,
            "tokenizer_path": MODEL,
            "served_model_name": MODEL,
            "is_generation": True,
            "disaggregation_mode": mode,
            "disaggregation_bootstrap_port": 8998,
            "incremental_streaming_output": True,
            "tp_size": 1,
            "dp_size": 1,
            "page_size": 1,
            "chunked_prefill_size": 8192,
            "max_total_num_tokens": KV_TOKENS,
            "max_running_requests": MAX_RUNNING,
            "max_req_input_len": 131072,
            "version": "0.5.23",
            "weight_version": "default",
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "has_image_understanding": False,
            "preferred_sampling_params": None,
            "internal_states": [{"disaggregation_mode": mode}],
        }

    def loads(self) -> dict[str, Any]:
        load = {
            "timestamp": time.time(),
            "dp_rank": 0,
            "num_running_reqs": self.books.running,
            "num_waiting_reqs": 0,
            "num_waiting_uncached_tokens": 0,
            "num_used_tokens": self.books.running * DEFAULT_TOKENS,
            "num_total_tokens": self.books.running * DEFAULT_TOKENS,
            "max_total_num_tokens": KV_TOKENS,
            "max_running_requests": MAX_RUNNING,
            "token_usage": 0.0,
        }
        return {"version": "0.5.23", "dp_rank_count": 1, "loads": [load]}

    def models(self) -> dict[str, Any]:
        card = {"id": MODEL, "object": "model", "created": 1, "owned_by": "sglang", "root": MODEL}
        return {"object": "list", "data": [{**card, "max_model_len": 131072}]}

    def abort(self) -> bytes:
        self.books.aborts += 1
        return b""

    def counted(self) -> dict[str, int]:
        books = self.books
        return {"requests": books.requests, "aborts": books.aborts, "running": books.running}


PROBES: dict[bytes, Callable[[Worker], object]] = {
    b"/model_info": Worker.information,
    b"/get_model_info": Worker.information,
    b"/server_info": Worker.information,
    b"/get_server_info": Worker.information,
    b"/v1/loads": Worker.loads,
    b"/v1/models": Worker.models,
    b"/abort_request": Worker.abort,
    b"/stats": Worker.counted,
    **dict.fromkeys((b"/health", b"/ready", b"/health_generate", b"/ping"), lambda _: b"OK"),
}
SHAPES = {shape.encode(): shape for shape in Shape}


class Connection(asyncio.Protocol):
    """One client, one request at a time."""

    transport: asyncio.Transport

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.parser = httptools.HttpRequestParser(self)
        self.path = b""
        self.body: list[bytes] = []
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.free()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self.path, self.body = b"", []

    def on_url(self, url: bytes) -> None:
        self.path += url

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        path = self.path.partition(b"?")[0]
        if path in PROBES:
            self.answer(PROBES[path](self.worker))
        elif path in SHAPES and not self.busy:
            self.generate(SHAPES[path], b"".join(self.body))
        else:
            self.reply(b"404 Not Found", b'{"detail":"Not Found"}')

    def answer(self, content: object) -> None:
        body = content if isinstance(content, bytes) else orjson.dumps(content)
        self.reply(b"200 OK", body)

    def reply(self, status: bytes, body: bytes) -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)

    def generate(self, shape: Shape, raw: bytes) -> None:
        try:
            body = orjson.loads(raw)
            tokens = asked_tokens(shape, body)
            streamed = bool(body.get("stream"))
        except (ValueError, TypeError, AttributeError):
            self.reply(b"400 Bad Request", b'{"error":"not a request"}')
            return
        self.start(shape, 1 if self.worker.role is Role.PREFILL else tokens, streamed=streamed)

    def start(self, shape: Shape, tokens: int, *, streamed: bool) -> None:
        self.busy = True
        self.worker.books.requests += 1
        self.worker.books.running += 1
        pace = self.worker.pace
        if streamed:
            stream = Stream(self, stream_steps(shape, tokens))
            self.at_once_or_later(pace.first_ms / 1000, self.first, stream)
        else:
            self.at_once_or_later(pace.whole_s(tokens), self.whole, whole_body(shape, tokens))

    def at_once_or_later(self, delay_s: float, call: Callable[[Any], None], argument: Any) -> None:
        if delay_s > 0:
            self.worker.loop.call_later(delay_s, call, argument)
        else:
            call(argument)

    def whole(self, body: bytes) -> None:
        if self.busy:
            self.free()
            self.answer(body)

    def first(self, stream: Stream) -> None:
        if not self.busy:
            return
        if not self.worker.pace.step_ms:
            stream.steps = (b"".join(stream.steps),)
        self.transport.write(HEAD_STREAM + stream.steps[0])
        stream.at = 1
        if stream.at == len(stream.steps):
            self.free()
        else:
            self.worker.steps.join(stream)

    def step(self, stream: Stream) -> bool:
        """Write the next token; false when there is nothing more to write or nobody to read it."""
        if not self.busy:
            return False
        self.transport.write(stream.steps[stream.at])
        stream.at += 1
        if stream.at < len(stream.steps):
            return True
        self.free()
        return False

    def free(self) -> None:
        if self.busy:
            self.busy = False
            self.worker.books.running -= 1


def asked_tokens(shape: Shape, body: dict[str, Any]) -> int:
    if shape is Shape.GENERATE:
        asked = body.get("sampling_params", {}).get("max_new_tokens", DEFAULT_TOKENS)
    else:
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or DEFAULT_TOKENS
    return max(1, min(int(asked), MOST_TOKENS))


async def listen(worker: Worker, *, port: int = 0) -> asyncio.Server:
    return await worker.loop.create_server(
        lambda: Connection(worker), "127.0.0.1", port, backlog=4096
    )


async def serve(role: Role, pace: Pace, port: int) -> None:
    server = await listen(Worker.on(asyncio.get_running_loop(), role, pace), port=port)
    gc.freeze()
    print("ready", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.worker --role decode --port 30100 --step-ms 20",
    )
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--role", type=Role, choices=list(Role), default=Role.UNIFIED)
    parser.add_argument("--first-ms", type=float, default=0.0, help="time to the first token")
    parser.add_argument(
        "--step-ms", type=float, default=20.0, help="time between tokens; 0 sends all at once"
    )
    asked = parser.parse_args()
    pace = Pace(first_ms=asked.first_ms, step_ms=asked.step_ms)
    uvloop.run(serve(asked.role, pace, asked.port))


if __name__ == "__main__":
    main()
