from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from backends.emulator import EmulatedFleet
from tests.backends.emulator.wire import events, greedy, pair


async def test_a_stream_is_cumulative_and_ends_with_done(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = greedy(5, text="hello", stream=True)
    async with http.post(fleet.urls["u"] + "/generate", json=body) as response:
        told = await events(response)
    assert [len(event["output_ids"]) for event in told[:-1]] == [1, 2, 3, 4, 5]
    assert told[-1] == "[DONE]"
    assert told[-2]["meta_info"]["finish_reason"] == {"type": "length", "length": 5}


async def test_an_incremental_server_streams_only_what_is_new(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = greedy(5, text="hello", stream=True)
    async with http.post(fleet.urls["i"] + "/generate", json=body) as response:
        told = (await events(response))[:-1]
    async with http.post(fleet.urls["i"] + "/generate", json=greedy(5, text="hello")) as response:
        whole = await response.json()
    assert [len(event["output_ids"]) for event in told] == [1] * 5
    assert "".join(event["text"] for event in told) == whole["text"]


async def test_a_pair_answers_as_a_unified_server_does(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = greedy(8, text="the same words") | pair(fleet["p"].bootstrap_port)

    async def leg(name: str) -> dict[str, Any]:
        async with http.post(fleet.urls[name] + "/generate", json=body) as response:
            answer: dict[str, Any] = await response.json()
            return answer

    prefill, decode, unified = await asyncio.gather(leg("p"), leg("d"), leg("u"))
    assert decode["output_ids"] == unified["output_ids"]
    assert decode["text"] == unified["text"]
    assert len(prefill["output_ids"]) == 1
    assert prefill["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert fleet.resident() == {}
