from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest

from benchmarks.load import Load, apply
from benchmarks.sse import TOKEN_MARK, Shape, stream_steps, whole_body
from benchmarks.worker import Pace, Role, Worker, listen


@asynccontextmanager
async def worker(role: Role = Role.UNIFIED, pace: Pace | None = None) -> AsyncIterator[Any]:
    it = Worker.on(asyncio.get_running_loop(), role, pace or Pace())
    server = await listen(it)
    port = server.sockets[0].getsockname()[1]
    async with server, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        yield it, client, f"http://127.0.0.1:{port}"


def asked(shape: Shape, tokens: int, *, stream: bool = True) -> dict[str, Any]:
    return Load(url="", clients=1, requests=1, tokens=tokens, stream=stream, shape=shape).body()


@pytest.mark.parametrize("shape", Shape)
async def test_a_stream_has_every_token_once_and_ends_with_done(shape: Shape) -> None:
    async with worker() as (_, client, _url):
        body = await (await client.post(shape, json=asked(shape, 5))).read()
    events = body.removesuffix(b"\n\n").split(b"\n\n")
    assert events[-1] == b"data: [DONE]"
    assert b"".join(events).count(TOKEN_MARK) == 5


@pytest.mark.parametrize("shape", Shape)
def test_each_event_is_json_and_the_last_one_tells_why_it_ended(shape: Shape) -> None:
    wire = b"".join(stream_steps(shape, 3))
    events = [line[6:] for line in wire.split(b"\r\n") if line.startswith(b"data: {")]
    last = orjson.loads(events[-1])
    finish = (
        last["meta_info"]["finish_reason"]["type"]
        if shape is Shape.GENERATE
        else last["choices"][0]["finish_reason"]
    )
    assert finish == "length"
    assert all(orjson.loads(event) for event in events)


@pytest.mark.parametrize("shape", Shape)
async def test_a_whole_answer_is_json_and_waits_for_its_tokens(shape: Shape) -> None:
    began = asyncio.get_running_loop().time()
    async with worker(pace=Pace(first_ms=50, step_ms=20)) as (_, client, _url):
        response = await client.post(shape, json=asked(shape, 4, stream=False))
        assert await response.read() == whole_body(shape, 4)
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.050 + 3 * 0.020)


async def test_a_prefill_server_answers_with_one_token_whatever_was_asked() -> None:
    async with worker(Role.PREFILL) as (_, client, _url):
        body = await (await client.post(Shape.CHAT, json=asked(Shape.CHAT, 64))).read()
    assert body.count(TOKEN_MARK) == 1
    assert body.endswith(b"data: [DONE]\n\n")


async def test_tokens_come_in_steps_and_the_first_one_at_its_own_time() -> None:
    now = asyncio.get_running_loop().time
    async with worker(pace=Pace(first_ms=100, step_ms=20)) as (_, _client, url):
        outcome = await apply(Load(url=url, clients=3, requests=6, tokens=5, spread_s=0.03), now)
    assert list(outcome.ttft_s) == pytest.approx([0.1] * 6)
    # The first gap ends at a step, between half a step and one and a half from the first token.
    assert all(0.00999 < gap < 0.03001 for gap in outcome.gaps_s)
    assert outcome.failed == 0


async def test_a_client_that_leaves_is_forgotten() -> None:
    async with worker() as (it, client, _url):
        response = await client.post(Shape.CHAT, json=asked(Shape.CHAT, 1000))
        assert it.books.running == 1
        response.close()
        await asyncio.sleep(0.1)
        assert it.books.running == 0


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/model_info", "disaggregation_mode"),
        ("/get_model_info", "model_path"),
        ("/server_info", "page_size"),
        ("/get_server_info", "max_total_num_tokens"),
        ("/v1/loads?include=core", "loads"),
        ("/v1/models", "data"),
    ],
)
async def test_the_questions_of_routers_are_answered(path: str, key: str) -> None:
    async with worker(Role.DECODE) as (_, client, _url):
        assert key in await (await client.get(path)).json()
        assert (await client.get("/health")).status == 200


async def test_what_is_no_request_is_a_400_and_an_unknown_path_a_404() -> None:
    async with worker() as (_, client, _url):
        assert (await client.post(Shape.CHAT, data=b"[")).status == 400
        assert (await client.post(Shape.CHAT, data=b"[]")).status == 400
        assert (await client.get("/nowhere")).status == 404
