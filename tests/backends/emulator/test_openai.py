from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from backends.emulator import EmulatedFleet
from tests.backends.emulator.wire import events, pair

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True}


async def test_a_chat_stream_has_a_role_deltas_a_finish_and_usage_on_request(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    async with http.post(fleet.urls["u"] + "/v1/chat/completions", json=body) as response:
        *chunks, used, done = await events(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert sum(bool(delta["content"]) for delta in deltas) == 3
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert (used["usage"]["completion_tokens"], done) == (3, "[DONE]")


async def test_a_chat_answer_is_the_same_whole_and_streamed(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"] + "/v1/chat/completions"
    async with http.post(url, json=CHAT) as response:
        whole = await response.json()
    async with http.post(url, json=CHAT | {"stream": True}) as response:
        chunks = (await events(response))[:-1]
    text = "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks)
    assert whole["choices"][0]["message"]["content"] == text
    assert whole["object"] == "chat.completion"


async def test_completions_give_token_ids_that_resume_exactly(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"] + "/v1/completions"
    body = {"prompt": "once upon a time", "max_tokens": 6, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    async with http.post(url, json=body) as response:
        choices = [chunk["choices"][0] for chunk in (await events(response))[:-1]]
    ids = [token for choice in choices for token in choice["token_ids"]]
    resumed = {**body, "prompt": choices[0]["prompt_token_ids"] + ids[:2], "max_tokens": 4}
    async with http.post(url, json=resumed | {"stream": False}) as response:
        rest = (await response.json())["choices"][0]
    assert ids[:2] + rest["token_ids"] == ids
    assert "".join(choice["text"] for choice in choices[2:]) == rest["text"]


async def test_a_stream_sends_its_headers_with_the_first_token(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    loop = asyncio.get_running_loop()
    long = {"prompt": "x" * 4 * 8000, "max_tokens": 1, "stream": True}
    began = loop.time()
    async with http.post(fleet.urls["u"] + "/v1/completions", json=long):
        openai_headers_s = loop.time() - began
    native = {"text": "y" * 4 * 8000, "stream": True}
    began = loop.time()
    async with http.post(fleet.urls["u"] + "/generate", json=native):
        native_headers_s = loop.time() - began
    assert openai_headers_s > 0.15
    assert native_headers_s < 0.05


async def test_a_refusal_is_a_clean_400_before_a_stream(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = CHAT | {"stream": True, "max_tokens": 10**9}
    async with http.post(fleet.urls["u"] + "/v1/chat/completions", json=body) as response:
        answer = await response.json()
    assert (response.status, answer["code"]) == (400, 400)
    assert answer["message"].startswith("Requested token count exceeds")


async def test_openai_routes_want_json(fleet: EmulatedFleet, http: aiohttp.ClientSession) -> None:
    async with http.post(fleet.urls["u"] + "/v1/completions", data=b'{"prompt":"x"}') as response:
        assert response.status == 400
        assert "application/json" in (await response.json())["message"]


async def test_a_chat_pair_answers_on_decode(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = CHAT | pair(fleet["p"].bootstrap_port)

    async def leg(name: str) -> Any:
        async with http.post(fleet.urls[name] + "/v1/chat/completions", json=body) as response:
            return await response.json()

    prefill, decode, unified = await asyncio.gather(leg("p"), leg("d"), leg("u"))
    contents = [it["choices"][0]["message"]["content"] for it in (prefill, decode, unified)]
    assert contents[1] == contents[2]
    assert contents[1].startswith(contents[0])


async def test_an_anthropic_stream_has_its_events_in_order(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = CHAT | {"stream": True, "system": "be brief"}
    async with http.post(fleet.urls["u"] + "/v1/messages", json=body) as response:
        kinds = [event["type"] for event in await events(response)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


async def test_responses_answer_whole_and_streamed(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url, body = fleet.urls["u"] + "/v1/responses", {"input": "hi", "max_output_tokens": 4}
    async with http.post(url, json=body) as response:
        whole = await response.json()
    async with http.post(url, json=body | {"stream": True}) as response:
        told = await events(response)
    deltas = [it["delta"] for it in told if it["type"] == "response.output_text.delta"]
    assert whole["output"][0]["content"][0]["text"] == "".join(deltas)
    assert told[-1]["type"] == "response.incomplete"  # its limit has cut it off


async def test_embeddings_need_a_unified_server(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = {"input": ["one", "two"]}
    async with http.post(fleet.urls["u"] + "/v1/embeddings", json=body) as response:
        assert [it["index"] for it in (await response.json())["data"]] == [0, 1]
    async with http.post(fleet.urls["p"] + "/v1/embeddings", json=body) as response:
        assert response.status == 400
