from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

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


async def test_a_batch_answers_in_order_with_numbered_rids(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = greedy(2, text=["one", "two"], rid="x")
    async with http.post(fleet.urls["u"] + "/generate", json=body) as response:
        answers = await response.json()
    assert [it["meta_info"]["id"] for it in answers] == ["x_0", "x_1"]
    assert answers[0]["output_ids"] != answers[1]["output_ids"]


async def test_a_streamed_batch_is_told_apart_by_index(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = greedy(2, text=["one", "two"], stream=True)
    async with http.post(fleet.urls["u"] + "/generate", json=body) as response:
        told = (await events(response))[:-1]
    assert sorted(event["index"] for event in told) == [0, 0, 1, 1]


async def test_several_samples_of_a_pair_collide_in_one_room(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = greedy(2, text="one") | pair(fleet["p"].bootstrap_port)
    body["sampling_params"]["n"] = 2
    async with http.post(fleet.urls["p"] + "/generate", json=body | {"stream": True}) as response:
        first = json.loads((await response.content.readline())[6:])
    assert first["meta_info"]["finish_reason"]["status_code"] == 500


async def test_a_stop_string_is_not_part_of_the_text(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"] + "/generate"
    async with http.post(url, json=greedy(20, text="hello")) as response:
        free = (await response.json())["text"]
    stop = free.split()[9]
    body = greedy(20, text="hello", stream=True)
    body["sampling_params"]["stop"] = [stop]
    async with http.post(url, json=body) as response:
        last = (await events(response))[-2]
    assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert last["text"] == free[: free.index(stop)]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "input_ids": [1]},
        {"input_ids": []},
        {"input_ids": ["a"]},
        {"text": 5},
        {"text": "a", "sampling_params": {"max_new_tokens": -1}},
        {"text": "a", "bootstrap_room": "seven"},
    ],
)
async def test_a_bad_body_is_a_400_with_a_plain_error(
    fleet: EmulatedFleet, http: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    async with http.post(fleet.urls["u"] + "/generate", json=body) as response:
        answer = await response.json()
    assert response.status == 400
    assert isinstance(answer["error"], str)


async def test_a_refusal_is_in_band_once_a_stream_began(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url, body = fleet.urls["u"] + "/generate", greedy(10**9, text="a")
    async with http.post(url, json=body | {"stream": True}) as response:
        told = await events(response)
    async with http.post(url, json=body) as unary:
        assert unary.status == 400
    assert response.status == 200
    assert told[0]["error"]["code"] == 400
    assert told[1:] == ["[DONE]"]


async def test_a_missing_room_is_400_unary_and_an_abort_chunk_streamed(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url, body = fleet.urls["d"] + "/generate", greedy(2, text="a")
    async with http.post(url, json=body) as unary:
        assert unary.status == 400
        assert "without bootstrap room id" in (await unary.json())["error"]["message"]
    async with http.post(url, json=body | {"stream": True}) as response:
        told = await events(response)
    assert told[0]["meta_info"]["finish_reason"]["status_code"] == 400


async def test_a_closed_stream_is_aborted_at_once(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = greedy(5000, text="a", stream=True)
    async with http.post(fleet.urls["u"] + "/generate", json=body) as response:
        await response.content.readline()
    await asyncio.sleep(0.05)
    assert fleet.resident() == {}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_closed_unary_call_is_noticed_at_the_next_tick(
    fleet: EmulatedFleet, http: aiohttp.ClientSession, path: str
) -> None:
    body = greedy(5000, text="a") | {"prompt": "a", "max_tokens": 5000, "ignore_eos": True}
    one_second = aiohttp.ClientTimeout(total=1)
    with pytest.raises(TimeoutError):
        await http.post(fleet.urls["u"] + path, json=body, timeout=one_second)
    await asyncio.sleep(2.5)
    assert list(fleet.resident()) == ["u"]
    await asyncio.sleep(1)
    assert fleet.resident() == {}


async def test_a_slow_reader_gets_fewer_chunks_and_all_tokens(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    """Cumulative chunks of a long answer fill every buffer while nobody reads."""
    body = greedy(3000, text="a", stream=True)
    async with http.post(fleet.urls["u"] + "/generate", json=body, read_bufsize=1024) as response:
        await asyncio.sleep(60)
        chunks = [line for line in (await response.read()).split(b"\n\n") if b"{" in line]
    assert len(chunks) < 3000
    assert len(json.loads(chunks[-1][6:])["output_ids"]) == 3000
