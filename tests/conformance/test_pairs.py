"""A prefill and a decode server answer as one."""

from __future__ import annotations

import asyncio

import pytest

from tests.conformance.under_test import Client, FleetUnderTest


@pytest.mark.parametrize("tokens", [3, 200, 1500])
async def test_a_pair_generates_what_a_unified_server_generates(
    client: Client, fleet: FleetUnderTest, tokens: int
) -> None:
    prompt = client.prompt(tokens)
    _, decode = await client.paired(prompt, 24)
    alone = await client.generated(fleet.unified, prompt, 24)
    assert decode.ids == alone.ids
    assert len(decode.ids) == 24


async def test_the_prefill_leg_answers_with_the_first_token_alone(client: Client) -> None:
    prefill, decode = await client.paired(client.prompt(50), 8)
    assert (prefill.status, prefill.done) == (200, True)
    assert prefill.finish == {"type": "length", "length": 0}
    assert prefill.ids == decode.ids[:1]


@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_the_legs_may_come_in_either_order(
    client: Client, fleet: FleetUnderTest, first: str
) -> None:
    meeting = client.meeting()
    urls = [fleet.prefill, fleet.decode]
    prompt = client.prompt(30)
    early = client.generate(urls.pop(first == "decode"), prompt, 4, **meeting)
    await asyncio.sleep(0.3)
    late = client.generate(urls.pop(), prompt, 4, **meeting)
    await asyncio.gather(early.task, late.task)
    assert {early.finish["type"], late.finish["type"]} == {"length"}


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_without_a_room_is_refused(
    client: Client, fleet: FleetUnderTest, role: str
) -> None:
    leg = await client.generated(getattr(fleet, role), client.prompt(5), 2, stream=False)
    assert leg.status == 400
    assert "Disaggregated request received without bootstrap room id." in leg.finish["message"]


async def test_chat_goes_through_a_pair(client: Client, fleet: FleetUnderTest) -> None:
    both = {"rid": client.rid(), **client.meeting()}
    prefill = client.chat(fleet.prefill, "a river and a stone", 6, **both)
    decode = client.chat(fleet.decode, "a river and a stone", 6, **both)
    alone = client.chat(fleet.unified, "a river and a stone", 6)
    await asyncio.gather(prefill.task, decode.task, alone.task)
    assert prefill.status == 200
    assert text_of(decode.chunks) == text_of(alone.chunks) != ""


async def test_cached_prompt_tokens_are_told_by_both_legs(client: Client) -> None:
    prompt = client.prompt(400)
    await client.paired(prompt, 2)
    prefill, decode = await client.paired(prompt, 2)
    assert prefill.meta["cached_tokens"] >= 390
    assert decode.meta["cached_tokens"] == prefill.meta["cached_tokens"]


def text_of(chunks: list[dict[str, object]]) -> str:
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]  # type: ignore[index]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
