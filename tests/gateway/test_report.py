"""What a request leaves behind in its headers."""

from __future__ import annotations

import asyncio

import orjson

from backends.exchange import Exchange, Timeline
from gateway.clients import UnaryClient
from gateway.dialects import Dialect, Limits, read
from gateway.report import header_lines
from gateway.visit import Part, Visit
from policies.types import Kind
from tests.gateway.talk import online


async def test_the_head_of_a_fan_out_tells_of_the_part_that_began_and_not_of_one_that_waits() -> (
    None
):
    client = UnaryClient(asyncio.get_running_loop())
    body = {"model": "m", "prompt": "hello", "n": 2, "stream": True}
    ask = read(Dialect.COMPLETIONS, orjson.dumps(body), limits=Limits())
    waits = Timeline(arrived_us=5_000_000)
    began = Timeline(arrived_us=5_000_000, dispatched_us=5_250_000, first_token_us=5_500_000)
    parts = [
        Part(
            online(decode),
            Exchange(
                job_id=decode,
                path=b"/v1/completions",
                dialect="completions",
                body={},
                stream=True,
                client=client,
                decode=decode if times.dispatched_us else "",
                timeline=times,
            ),
        )
        for decode, times in (("d1", waits), ("d2", began))
    ]
    lines = header_lines(Visit("id", "", Kind.ONLINE, ask, "", client, parts))
    assert "x-slackwater-worker: d2\r\n" in lines
    assert "server-timing: queue;dur=250.0, prefill;dur=250.0\r\n" in lines
