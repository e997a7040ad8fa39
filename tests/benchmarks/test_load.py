from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import Answer, Flaw, Load, Outcome, apply, hold, quantile, summary
from benchmarks.sse import DONE, HEAD_STREAM, Shape, chunk, event, stream_steps, whole_body
from benchmarks.worker import Pace, Role, Worker, listen
from gateway.config import Online
from tests.benchmarks.servers import Then, scripted

TOKENS = 4
WHOLE = HEAD_STREAM + b"".join(stream_steps(Shape.CHAT, TOKENS))
TOO_BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy"


def unary(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def load(url: str, *, stream: bool = True) -> Load:
    return Load(url=url, clients=2, requests=5, tokens=TOKENS, stream=stream)


async def test_whole_answers_are_counted_and_timed() -> None:
    async with scripted(WHOLE) as url:
        outcome = await apply(load(url))
    assert (outcome.answered, outcome.failed, outcome.tokens) == (5, 0, 5 * TOKENS)
    assert (len(outcome.ttft_s), len(outcome.gaps_s)) == (5, 5 * (TOKENS - 1))


@pytest.mark.parametrize(
    ("answer", "then", "flaw"),
    [
        (TOO_BUSY, Then.KEEP, f"{Flaw.STATUS} 503"),
        (WHOLE[:-40], Then.CLOSE, Flaw.CUT),
        (b"", Then.CLOSE, Flaw.CUT),
        (WHOLE.replace(chunk(DONE), b""), Then.KEEP, Flaw.NO_DONE),
        (HEAD_STREAM + b"".join(stream_steps(Shape.CHAT, 3)), Then.KEEP, Flaw.COUNT),
        (HEAD_STREAM + b"".join(stream_steps(Shape.CHAT, 5)), Then.KEEP, Flaw.COUNT),
        (
            HEAD_STREAM + chunk(event({"error": {"code": 500}}) + DONE) + b"0\r\n\r\n",
            Then.KEEP,
            Flaw.IN_BAND,
        ),
        (b"SSH-2.0-not-http\r\n\r\n", Then.KEEP, Flaw.GARBLED),
        (WHOLE[:-40], Then.HANG, Flaw.TIMEOUT),
    ],
)
async def test_an_answer_that_is_not_whole_and_exact_is_an_error(
    answer: bytes, then: Then, flaw: str
) -> None:
    async with scripted(answer, then=then) as url:
        outcome = await apply(load(url))
    assert outcome.errors == {flaw: 5}
    assert outcome.answered == outcome.tokens == 0


@pytest.mark.parametrize(
    ("body", "flaw"),
    [
        (whole_body(Shape.CHAT, TOKENS - 1), Flaw.COUNT),
        (whole_body(Shape.CHAT, TOKENS).replace(b"tok2 ", b""), Flaw.COUNT),
        (b"not json", Flaw.GARBLED),
        (b'{"choices": []}', Flaw.GARBLED),
    ],
)
async def test_a_whole_answer_must_have_the_text_it_says_it_has(body: bytes, flaw: str) -> None:
    async with scripted(unary(body)) as url:
        outcome = await apply(load(url, stream=False))
    assert outcome.errors == {flaw: 5}


async def test_nobody_listening_is_an_error_for_every_request() -> None:
    async with scripted() as url:
        pass
    assert (await apply(load(url))).errors == {Flaw.CONNECT: 5}


async def test_one_bad_answer_among_good_ones_is_not_lost() -> None:
    worker = Worker.on(asyncio.get_running_loop(), Role.UNIFIED, Pace())
    async with await listen(worker) as server, scripted(TOO_BUSY) as bad:
        good = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        outcomes = [await apply(load(url)) for url in (good, bad)]
    assert [outcome.failed for outcome in outcomes] == [0, 5]
    assert [outcome.answered for outcome in outcomes] == [5, 0]


@given(st.lists(st.integers(0, 2000), max_size=8))
def test_tokens_are_counted_rightly_wherever_the_body_is_cut(cuts: list[int]) -> None:
    body = b"".join(line for line in WHOLE.split(b"\r\n") if line.startswith(b"data: "))
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    answer = Answer(0.0)
    pieces = [body[start:end] for start, end in pairwise(edges)]
    assert sum(answer.new_tokens(piece) for piece in pieces) == TOKENS
    assert answer.done
    assert not answer.tail


async def test_held_streams_are_all_open_when_the_measurement_is_taken_and_gone_after() -> None:
    worker = Worker.on(asyncio.get_running_loop(), Role.UNIFIED, Pace(step_ms=1000))
    async with await listen(worker) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        held = Load(url=url, clients=20, requests=20, tokens=100, spread_s=1.0)
        outcome, seen = await hold(held, lambda: float(worker.books.running))
        await asyncio.sleep(0.1)
    assert (seen, worker.books.running, outcome.failed) == (20.0, 0, 0)


async def test_streams_that_cannot_all_be_opened_are_not_measured() -> None:
    async with scripted(TOO_BUSY) as url:
        outcome, seen = await hold(load(url), lambda: 1.0)
    assert seen is None
    assert outcome.failed == 5


def test_what_was_not_measured_is_null_and_not_zero() -> None:
    outcome = Outcome()
    outcome.errors[Flaw.CUT] += 1
    found = orjson.loads(orjson.dumps(summary(outcome)))
    assert found["ttft_ms_p50"] is None
    assert found["errors"] == {"connection closed inside an answer": 1}
    assert quantile(Outcome().gaps_s, 0.5) is None


def test_the_targets_of_the_locustfile_are_the_gateways() -> None:
    """Locust patches the whole process when it is imported: its file is read."""
    text = (Path(__file__).parents[2] / "benchmarks" / "locustfile.py").read_text()
    told = dict(re.findall(r'\("online-(\w+)-ms", ([0-9.]+),', text))
    assert told == {"ttft": str(Online().ttft_ms), "tpot": str(Online().tpot_ms)}


def test_headers_of_a_load_are_on_the_wire() -> None:
    wire = replace(load("http://127.0.0.1:1"), headers=(("x-slackwater-class", "offline"),)).wire()
    head, _, body = wire.partition(b"\r\n\r\n")
    assert b"x-slackwater-class: offline" in head
    assert f"content-length: {len(body)}".encode() in head
