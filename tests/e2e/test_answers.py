"""Every protocol through the gateway onto real servers: the answers are the servers' own."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.conformance.under_test import Client
from tests.e2e.site import OFFLINE, REAL, Site, standing

pytestmark = REAL
PD = ("prefill", "decode")
STREAM = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
SAMPLING = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


@STREAM
async def test_a_generate_request_through_a_pair_has_the_unified_servers_tokens(
    client: Client, *, stream: bool
) -> None:
    prompt = client.prompt(300)
    async with standing(client, *PD) as site:
        leg = await site.generated(prompt, 24, stream=stream)
        assert leg.ids == await site.alone(prompt, 24)
        assert leg.finish == {"type": "length", "length": 24}
        assert leg.headers["x-slackwater-worker"] == "prefill,decode"


async def test_an_offline_whole_answer_is_put_together_from_a_stream(client: Client) -> None:
    prompt = client.prompt(100)
    async with standing(client) as site:
        leg = await site.generated(prompt, 24, stream=False, headers=OFFLINE)
        assert leg.ids == await site.alone(prompt, 24)
        assert leg.meta["completion_tokens"] == 24


async def test_a_batch_is_answered_in_its_order(client: Client) -> None:
    prompts = [client.prompt(20 + 10 * n) for n in range(4)]
    async with standing(client) as site:
        leg = await site.ask("/generate", {"input_ids": prompts, "sampling_params": SAMPLING})
        assert [one["output_ids"] for one in leg.body] == [
            await site.alone(prompt, 12) for prompt in prompts
        ]


async def test_two_samples_of_a_prompt_are_two_answers(client: Client) -> None:
    prompt = client.prompt(30)
    async with standing(client, *PD) as site:
        body = {"input_ids": prompt, "sampling_params": {**SAMPLING, "n": 2}}
        leg = await site.ask("/generate", body)
        assert [one["output_ids"] for one in leg.body] == [await site.alone(prompt, 12)] * 2


async def test_a_streamed_batch_tells_its_answers_apart(client: Client) -> None:
    prompts = [client.prompt(20), client.prompt(30)]
    async with standing(client, *PD) as site:
        body = {"input_ids": prompts, "sampling_params": SAMPLING, "stream": True}
        leg = await site.ask("/generate", body)
        last = {chunk["index"]: chunk["output_ids"] for chunk in leg.chunks}
        assert last == {n: await site.alone(prompt, 12) for n, prompt in enumerate(prompts)}
        assert leg.done


def completion(leg_body: dict[str, Any]) -> str:
    return str(leg_body["choices"][0]["text"])


@STREAM
async def test_a_completion_has_the_unified_servers_text(client: Client, *, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "a river and a stone", "max_tokens": 12, "temperature": 0}
    async with standing(client, *PD) as site:
        leg = await site.ask("/v1/completions", body | {"stream": stream})
        direct = client.send(client.fleet.unified + "/v1/completions", body)
        await direct.task
        text = "".join(map(completion, leg.chunks)) if stream else completion(leg.body)
        assert text == completion(direct.body)


def chat_text(leg_body: dict[str, Any]) -> str:
    return str(leg_body["choices"][0]["message"]["content"])


def deltas(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@STREAM
async def test_a_chat_has_the_unified_servers_text(client: Client, *, stream: bool) -> None:
    async with standing(client, *PD) as site:
        leg = site.chat(16, stream=stream)
        await leg.task
        direct = client.chat(client.fleet.unified, "Tell me of a river", 16, stream=False)
        await direct.task
        text = deltas(leg.chunks) if stream else chat_text(leg.body)
        assert text == chat_text(direct.body)


@STREAM
async def test_anthropic_messages_are_answered(client: Client, *, stream: bool) -> None:
    body = {
        "model": "tiny",
        "max_tokens": 12,
        "messages": [{"role": "user", "content": "Tell me of a river"}],
        "stream": stream,
    }
    async with standing(client, *PD) as site:
        leg = await site.ask("/v1/messages", body)
        assert leg.status == 200, leg.body
        if stream:
            kinds = [chunk["type"] for chunk in leg.chunks]
            assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        else:
            assert leg.body["type"] == "message"
            assert leg.body["usage"]["output_tokens"] <= 12


@STREAM
async def test_responses_are_answered(client: Client, *, stream: bool) -> None:
    body = {"model": "tiny", "input": "Tell me of a river", "max_output_tokens": 12}
    async with standing(client, *PD) as site:
        leg = await site.ask("/v1/responses", body | {"stream": stream, "store": False})
        assert leg.status == 200, leg.body
        if stream:
            kinds = [chunk["type"] for chunk in leg.chunks]
            assert (kinds[0], kinds[-1]) == ("response.created", "response.incomplete")
        else:
            assert (leg.body["object"], leg.body["status"]) == ("response", "incomplete")


def official(site: Site) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)


async def test_the_official_client_chats(client: Client) -> None:
    messages: Any = [{"role": "user", "content": "Tell me of a river"}]
    async with standing(client) as site, official(site) as asks:
        told = await asks.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, temperature=0
        )
        stream = await asks.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(pieces) == told.choices[0].message.content != ""
        assert told.usage is not None
        assert told.usage.completion_tokens <= 12


async def test_the_official_client_is_told_what_is_wrong(client: Client) -> None:
    async with standing(client) as site, official(site) as asks:
        with pytest.raises(openai.NotFoundError):
            await asks.completions.create(model="another", prompt="x")
        with pytest.raises(openai.BadRequestError):
            await asks.completions.create(model="tiny", prompt="x", max_tokens=100_000)


@pytest.mark.parametrize(
    ("headers", "decode"), [({}, "decode"), (OFFLINE, "relaxed")], ids=["online", "offline"]
)
async def test_each_class_decodes_in_its_own_pool(
    client: Client, headers: dict[str, str], decode: str
) -> None:
    async with standing(client, "prefill", "decode", "relaxed") as site:
        legs = [site.generate(client.prompt(30), 40, headers=headers) for _ in range(4)]
        for leg in legs:
            await leg.task
        assert {leg.headers["x-slackwater-worker"] for leg in legs} == {f"prefill,{decode}"}
        assert [leg.finish["type"] for leg in legs] == ["length"] * 4


CONTEXT_TOKENS = 16_384
WRONG: dict[str, tuple[str, dict[str, Any], int]] = {
    "no-prompt": ("/generate", {"sampling_params": SAMPLING}, 400),
    "an-unknown-setting": (
        "/generate",
        {"text": "x", "sampling_params": {"max_new_tokens": 4, "warmth": 1}},
        400,
    ),
    "a-bad-temperature": (
        "/generate",
        {"text": "x", "sampling_params": {"max_new_tokens": 4, "temperature": -3}},
        400,
    ),
    "too-long-a-prompt": (
        "/generate",
        {"input_ids": [7] * (CONTEXT_TOKENS + 9), "sampling_params": SAMPLING},
        400,
    ),
    "too-long-an-answer": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": CONTEXT_TOKENS + 9},
        400,
    ),
    "an-unknown-role": (
        "/v1/chat/completions",
        {"messages": [{"role": "nobody", "content": "x"}], "max_tokens": 4},
        400,
    ),
    "an-unknown-model": (
        "/v1/completions",
        {"model": "another", "prompt": "x", "max_tokens": 4},
        404,
    ),
}


@STREAM
@pytest.mark.parametrize("wrong", WRONG)
async def test_a_bad_request_is_refused_and_the_next_is_served(
    client: Client, wrong: str, *, stream: bool
) -> None:
    path, body, status = WRONG[wrong]
    async with standing(client, *PD) as site:
        leg = await site.ask(path, body | {"stream": stream})
        assert leg.status == status, leg.last
        assert leg.body["error"]["message"]
        assert (await site.generated(client.prompt(9), 3)).finish["type"] == "length"
