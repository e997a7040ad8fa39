"""Real servers that die, hang and come back under the gateway's hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from gateway.config import Classes, Online
from tests.conformance.test_roles import TO_DECODE, TO_PREFILL, switch
from tests.conformance.under_test import (
    CHUNK_TOKENS,
    RENDEZVOUS_TIMEOUT_S,
    SLOW_S,
    Client,
    Leg,
    is_idle,
)
from tests.e2e.site import QUICK, REAL, SHARED, Site, over, standing

pytestmark = REAL
TOKENS = 250
ENDLESS_TOKENS = 4000
STEP_S = 0.2
TWO_DECODES = ("prefill", "decode", "relaxed")
BACK_WITHIN_S = 10.0


@asynccontextmanager
async def dead(client: Client, url: str) -> AsyncIterator[None]:
    """Killed when the block begins, started again and ready when it ends."""
    await client.fleet.kill(url)
    try:
        yield
    finally:
        await client.fleet.start(url)
        if url == client.fleet.prefill:
            await reconnected(client)


@asynccontextmanager
async def reconnecting(client: Client) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await reconnected(client)


async def reconnected(client: Client) -> None:
    """A dead connection to the prefill server, which costs a pair, is left to no later gateway."""
    fleet = client.fleet

    async def met(decode: str) -> None:
        ended = ""
        while ended != "length":
            _, leg = await client.paired(client.prompt(9), 1, decode=decode)
            ended = leg.finish["type"]

    async with asyncio.TaskGroup() as group:
        for decode in (fleet.decode, fleet.relaxed):
            group.create_task(met(decode))


async def some_tokens(leg: Leg, tokens: int = 20) -> None:
    """The stream is in its middle: this many events have come, and many more will."""
    async with asyncio.timeout(10.0):
        while len(leg.chunks) < tokens:
            assert not leg.task.done(), leg.last
            await asyncio.sleep(0.01)


async def streaming_from(site: Site, server: str, prompt: list[int], **more: object) -> Leg:
    """A stream that this decode server makes slowly: another one keeps the first server busy."""
    client, ledgers = site.client, site.gateway.core.ledgers
    for url in (client.fleet.decode, client.fleet.relaxed):
        await client.slow(url, SLOW_S)
    # What an earlier test has left on one of them would make the other the first choice.
    await site.until(lambda: not any(ledgers[it].foreign_tokens for it in ("decode", "relaxed")))
    if server == "relaxed":
        await some_tokens(site.generate(client.prompt(30), TOKENS), 1)
    leg = site.generate(prompt, TOKENS, **more)
    await some_tokens(leg)
    assert leg.headers["x-slackwater-worker"] == f"prefill,{server}"
    return leg


async def at_full_speed(site: Site, *, but: str = "") -> None:
    fleet = site.client.fleet
    for url in {fleet.prefill, fleet.decode, fleet.relaxed} - {but}:
        await site.client.slow(url, None)


async def serves_again(site: Site, server: str) -> None:
    """As soon as the gateway has seen that the server is back, it is used."""
    ledger = site.gateway.core.ledgers[server]
    now_us = site.gateway.backend.now_us
    await site.until(lambda: ledger.up and ledger.usable(now_us()), BACK_WITHIN_S)
    leg = await site.generated(site.client.prompt(30), 5)
    assert leg.finish == {"type": "length", "length": 5}, leg.finish
    assert server in leg.headers["x-slackwater-worker"].split(",")


@pytest.mark.parametrize("first", ["decode", "relaxed"], ids=["cumulative", "incremental"])
async def test_a_stream_goes_on_token_for_token_when_its_decode_server_dies(
    client: Client, first: str
) -> None:
    """The two servers stream in different ways: the client sees the first one's to the end."""
    prompt, url = client.prompt(200), getattr(client.fleet, first)
    async with standing(client, *TWO_DECODES, policies=SHARED) as site:
        undisturbed = await site.alone(prompt, TOKENS)
        leg = await streaming_from(site, first, prompt)
        async with dead(client, url):
            await at_full_speed(site, but=url)
            await asyncio.wait_for(leg.task, 30.0)
        assert leg.finish == {"type": "length", "length": TOKENS}, leg.last
        assert leg.ids == undisturbed
        assert len({chunk["meta_info"]["id"] for chunk in leg.chunks}) == 1


async def test_a_killed_decode_server_is_used_again_once_it_is_back(client: Client) -> None:
    async with standing(client, "prefill", "decode") as site:
        leg = site.generate(client.prompt(30), ENDLESS_TOKENS)
        await some_tokens(leg)
        async with dead(client, client.fleet.decode):
            await asyncio.wait_for(leg.task, 15.0)
        assert leg.last["error"]["code"] == "stream_interrupted"
        await serves_again(site, "decode")


async def test_a_prefill_server_that_is_back_before_decode_servers_miss_it_loses_no_request(
    client: Client,
) -> None:
    """Only where the gateway names it anew does a decode server connect to it anew."""
    async with reconnecting(client), standing(client, "prefill", "decode") as site:
        await site.generated(client.prompt(30), 5)
        await client.fleet.kill(client.fleet.prefill)
        await site.until(lambda: not site.gateway.core.ledgers["prefill"].up)
        await client.fleet.start(client.fleet.prefill)
        await serves_again(site, "prefill")
        assert site.lines[-1]["attempts"] == 1


async def test_a_pair_lost_to_a_switch_that_nobody_saw_is_tried_again_and_then_works(
    client: Client,
) -> None:
    telemetry = replace(QUICK.telemetry, poll_ms=60_000.0)
    timeouts = replace(QUICK.timeouts, first_token_online_s=RENDEZVOUS_TIMEOUT_S - 2.0)
    async with (
        reconnecting(client),
        standing(client, "prefill", "decode", telemetry=telemetry, timeouts=timeouts) as site,
    ):
        await site.generated(client.prompt(30), 5)
        for body in (TO_DECODE, TO_PREFILL):
            assert (await switch(client, client.fleet.prefill, body))[0] == 200
        first = await site.generated(client.prompt(30), 5)
        second = await site.generated(client.prompt(30), 5)
        assert first.finish == second.finish == {"type": "length", "length": 5}
        assert [line["attempts"] for line in site.lines[-2:]] == [2, 1]


async def test_a_chat_stream_ends_with_an_error_in_the_stream_when_its_server_dies(
    client: Client,
) -> None:
    async with standing(client, "prefill", "decode") as site:
        leg = site.chat(ENDLESS_TOKENS)
        await some_tokens(leg)
        async with dead(client, client.fleet.decode):
            await asyncio.wait_for(leg.task, 5.0)
        assert leg.last["error"]["code"] == "stream_interrupted"
        assert leg.done
        await serves_again(site, "decode")


async def test_a_whole_chat_answer_is_made_anew_when_its_server_dies(client: Client) -> None:
    fleet = client.fleet
    urls = {"decode": fleet.decode, "relaxed": fleet.relaxed}
    async with standing(client, *TWO_DECODES, policies=SHARED) as site:
        undisturbed = await over(site.chat(120, stream=False))
        for url in urls.values():
            await client.slow(url, SLOW_S)
        leg = site.chat(120, stream=False)
        ledgers = site.gateway.core.ledgers
        await site.until(lambda: any(ledgers[name].decodes for name in urls))
        first, second = sorted(urls, key=lambda name: -ledgers[name].decodes)
        await client.until(urls[first], lambda load: load["num_running_reqs"] == 1)
        async with dead(client, urls[first]):
            await leg.task
        assert leg.headers["x-slackwater-worker"] == f"prefill,{second}"
        assert leg.body["choices"] == undisturbed.body["choices"]


async def half_prefilled(site: Site, prompt: list[int], tokens: int) -> Leg:
    """The decode leg waits for a prompt whose first chunks are done."""
    client = site.client
    await client.slow(client.fleet.prefill, STEP_S)
    leg = site.generate(prompt, tokens)

    def is_there(load: dict[str, Any]) -> bool:
        assert not leg.task.done(), leg.last
        return bool(0 < load["num_waiting_uncached_tokens"] < len(prompt) - CHUNK_TOKENS)

    await client.until(client.fleet.prefill, is_there)
    return leg


async def test_a_prompt_whose_prefill_server_dies_is_answered_by_another(client: Client) -> None:
    prompt = client.prompt(6 * CHUNK_TOKENS)
    async with standing(client, "prefill", "decode") as site:
        undisturbed = await site.alone(prompt, 12)
        leg = await half_prefilled(site, prompt, 12)
        site.gateway.adopt(replace(site.config, worker=site.entries("decode", "unified")))
        async with dead(client, client.fleet.prefill):
            await asyncio.wait_for(leg.task, 20.0)
        assert leg.ids == undisturbed
        assert leg.headers["x-slackwater-worker"] == "unified"


async def test_a_prompt_whose_only_prefill_server_dies_fails_soon(client: Client) -> None:
    impatient = Classes(online=Online(ttft_ms=1000.0, patience=4.0))
    async with standing(client, "prefill", "decode", classes=impatient) as site:
        leg = await half_prefilled(site, client.prompt(6 * CHUNK_TOKENS), 12)
        async with dead(client, client.fleet.prefill):
            await asyncio.wait_for(leg.task, 15.0)
            await client.until(client.fleet.decode, is_idle, 4.0)
        assert leg.status in (502, 503)
        assert leg.body["error"]["code"] in ("upstream_failed", "workers_unavailable")
        await serves_again(site, "prefill")


async def test_a_server_that_falls_silent_in_a_stream_is_left_for_another(client: Client) -> None:
    prompt = client.prompt(100)
    timeouts = replace(QUICK.timeouts, between_tokens_s=1.0)
    async with standing(client, *TWO_DECODES, policies=SHARED, timeouts=timeouts) as site:
        undisturbed = await site.alone(prompt, TOKENS)
        leg = await streaming_from(site, "decode", prompt)
        await client.post(client.fleet.decode + "/pause_generation", {"mode": "in_place"})
        await at_full_speed(site)
        await asyncio.wait_for(leg.task, 30.0)
        await client.post(client.fleet.decode + "/continue_generation", {})
        assert leg.finish == {"type": "length", "length": TOKENS}, leg.last
        assert leg.ids == undisturbed
        await site.freed()


async def test_everything_ends_when_servers_die_under_load(client: Client) -> None:
    """Streams that can be resumed are complete, others end with an error of theirs.

    Four slots are left for ten requests: how long that takes is the machine's, not the subject.
    """
    patient = Classes(online=Online(patience=30.0))
    async with standing(client, *TWO_DECODES, policies=SHARED, classes=patient) as site:
        prompts = [client.prompt(client.rng.randint(20, 400)) for _ in range(6)]
        undisturbed = [await site.alone(prompt, 200) for prompt in prompts]
        legs = [site.generate(prompt, 200) for prompt in prompts]
        chats = [site.chat(200) for _ in range(4)]
        await some_tokens(legs[0], 5)
        async with dead(client, client.fleet.decode):
            async with asyncio.timeout(30.0):
                await asyncio.wait([leg.task for leg in (*legs, *chats)])
        assert [leg.ids for leg in legs] == undisturbed
        assert all(leg.done for leg in chats)
