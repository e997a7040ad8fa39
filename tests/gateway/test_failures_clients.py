"""Clients that leave, stall or hardly speak: their requests go, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from backends.emulator import FaultKind
from policies.types import Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    PAIR,
    QUICK,
    RawClient,
    Site,
    chat,
    code_in,
    completion,
    events_in,
    generate,
    spec,
    standing,
)

ONE_AT_A_TIME = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, max_running=1))
FAR_APART = (
    spec("p1", Role.PREFILL, link_latency_s=0.5),
    spec("d1", Role.DECODE, link_latency_s=0.5),
)
SENT_BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate-streamed": ("/generate", generate(300, stream=True)),
    "generate-whole": ("/generate", generate(300)),
    "chat-streamed": ("/v1/chat/completions", chat(300, stream=True)),
    "chat-whole": ("/v1/chat/completions", chat(300)),
    "chat-three-samples-streamed": ("/v1/chat/completions", chat(300, n=3, stream=True)),
    "completions-batch-whole": ("/v1/completions", completion(300, prompt=["a b c", "d e f"])),
}
WHAT = pytest.mark.parametrize("what", SENT_BODIES)


@dataclass(frozen=True, slots=True)
class Moment:
    """A state of a request, and how a test knows that it is in it."""

    specs: tuple[Any, ...]
    slow: float
    reached: Callable[[Site], object]


def stages(site: Site) -> set[str]:
    return {
        f"{name}:{it.stage.name}"
        for name, server in site.fleet.servers.items()
        for it in server.engine.residents
    }


MOMENTS = {
    "its-prompt-is-computed": Moment(PAIR, 200.0, lambda site: len(site.sent) >= 2),
    "its-cache-is-transferred": Moment(FAR_APART, 1.0, lambda site: "p1:SENDING" in stages(site)),
    "its-answer-is-made": Moment(PAIR, 1.0, lambda site: "d1:RUNNING" in stages(site)),
}


@WHAT
@pytest.mark.parametrize("when", MOMENTS)
async def test_a_client_that_leaves_takes_both_legs_with_it_while(when: str, what: str) -> None:
    moment = MOMENTS[when]
    async with standing(moment.specs) as site:
        site.hurt("p1", FaultKind.SLOW, factor=moment.slow)
        client = await RawClient.connect(site)
        client.post(*SENT_BODIES[what])
        await site.until(when, lambda: moment.reached(site))
        client.vanish()
        assert await site.nothing_left(within_s=3.0) == []
        site.heal("p1")
        await site.serves()


async def test_what_a_client_was_given_before_it_left_is_counted() -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.post("/generate", generate(500, stream=True))
        await site.until("it runs", lambda: site.fleet.engines["d1"].residents)
        await asyncio.sleep(0.5)
        client.vanish()
        await site.until("it is told of", lambda: site.lines)
        assert site.lines[0]["outcome"] == "request_cancelled"
        assert 10 < site.lines[0]["tokens"] < 500


@WHAT
async def test_a_client_that_leaves_while_it_is_queued_was_never_sent(what: str) -> None:
    async with standing(ONE_AT_A_TIME) as site:
        async with site.meanwhile(site.ask("/generate", generate(100))) as running:
            await site.until("one is running", lambda: len(site.sent) == 2)
            client = await RawClient.connect(site)
            client.post(*SENT_BODIES[what])
            await site.until("another waits", lambda: len(site.gateway.front) == 2)
            client.vanish()
            await site.until("it is gone", lambda: len(site.gateway.front) == 1)
            assert (await running).status == 200
        assert len(site.sent) == 2


async def test_a_client_that_leaves_between_two_attempts_is_not_tried_again() -> None:
    async with standing() as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500)
        client = await RawClient.connect(site)
        client.post("/generate", generate(), more="x-slackwater-class: offline\r\n")
        await site.until("it has failed twice", lambda: len(site.sent_to("p1")) == 2)
        client.vanish()
        await asyncio.sleep(5)
        assert len(site.sent_to("p1")) == 2


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"POST /gen",
        b"POST /generate HTTP/1.1\r\nhost: x\r\n",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n",
        b'POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"text": ',
        b'POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n9\r\n{"te',
    ],
)
async def test_a_client_that_leaves_before_it_has_asked_leaves_nothing(said: bytes) -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.say(said)
        await asyncio.sleep(0.1)
        client.vanish()
        await site.serves()
        assert len(site.sent) == 2


async def test_the_request_after_a_cancelled_one_is_served_as_ever() -> None:
    async with standing(ONE_AT_A_TIME) as site:
        for turn in range(6):
            client = await RawClient.connect(site)
            client.post("/generate", generate(500, stream=True, rid="the-same"))
            await asyncio.sleep(0.02 * turn)
            client.vanish()
            told = await site.ask("/generate", generate(3, rid=f"another-{turn}"))
            assert told.status == 200
            assert told.took_s < 0.3


async def test_a_client_that_stops_reading_is_cut_off_and_its_slot_is_freed() -> None:
    timeouts = replace(QUICK.timeouts, client_stall_s=2.0)
    async with standing(ONE_AT_A_TIME, timeouts=timeouts) as site:
        client = await RawClient.connect(site, buffer_bytes=4096)
        client.post("/generate", generate(20_000, stream=True))
        await client.head()
        answering = len(site.gateway.front)
        await site.until("it is cut off", lambda: not len(site.gateway.front), within_s=20.0)
        assert answering == 1
        await site.serves()


async def test_a_half_closed_socket_is_a_client_that_has_left() -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.post("/generate", generate(500, stream=True))
        await client.head()
        client.writer.write_eof()
        assert await site.nothing_left(within_s=1.0) == []
        assert b"[DONE]" not in await client.rest()


async def test_headers_that_trickle_are_cut_off_in_time() -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        began_s = site.now_s()
        for letter in b"POST /generate HT":
            client.say(bytes([letter]))
            await asyncio.sleep(0.4)
        assert await client.rest() == b""
        assert site.now_s() - began_s <= QUICK.server.header_timeout_s + 4


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/tokenize"])
async def test_a_body_that_trickles_is_answered_408_in_time(path: str) -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        began_s = site.now_s()
        client.say(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{" % path.encode())
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 408")
        assert site.now_s() - began_s == pytest.approx(QUICK.server.body_timeout_s, abs=0.1)
        assert b'"request_timeout"' in await client.rest()


async def test_an_http_1_0_client_gets_its_stream_without_chunks() -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.post("/generate", generate(5, stream=True), version="1.0")
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert [type(event) for event in events_in(body)] == [dict] * 5 + [str]
        assert body.endswith(b"data: [DONE]\n\n")


async def test_an_http_1_0_client_gets_whole_answers_too() -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        client.post("/generate", generate(5), version="1.0")
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b" 200 " in head.splitlines()[0]
        assert json.loads(body)["meta_info"]["completion_tokens"] == 5


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        for tokens in (3, 4):
            client.post("/generate", generate(tokens, stream=True))
        client.post("/generate", generate(5), more="connection: close\r\n")
        told = await client.rest()
        lengths = [event["meta_info"]["completion_tokens"] for event in map(as_json, split(told))]
        assert lengths == [3, 4, 5]


def split(told: bytes) -> list[bytes]:
    """The last event of each stream, and the whole answer."""
    streams = told.split(b"data: [DONE]\n\n")
    last = [stream.split(b"data: ")[-1].splitlines()[0] for stream in streams[:-1]]
    return [*last, told.rpartition(b"\r\n\r\n")[2]]


def as_json(raw: bytes) -> Any:
    return json.loads(raw)


async def test_a_pipelined_request_behind_one_whose_client_left_is_not_served() -> None:
    async with standing() as site:
        client = await RawClient.connect(site)
        for _ in range(5):
            client.post("/generate", generate(300, stream=True))
        await client.head()
        client.vanish()
        assert await site.nothing_left(within_s=1.0) == []
        assert len(site.sent) == 2


async def test_offline_whole_answers_leave_with_their_client() -> None:
    async with standing() as site:
        async with site.meanwhile(site.ask("/generate", generate(3_000), OFFLINE)):
            await site.until("it decodes", lambda: "d1:RUNNING" in stages(site))
        assert await site.nothing_left(within_s=1.0) == []


async def test_a_refusal_is_read_even_by_a_client_that_has_sent_too_much() -> None:
    server = replace(QUICK.server, max_body_mb=0.01)
    async with standing(server=server) as site:
        told = await site.ask("/v1/chat/completions", chat(text="x" * 20_000))
        assert (told.status, code_in(told.body)) == (413, "body_too_large")
