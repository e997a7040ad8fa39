"""Clients that leave or abort: nothing of their requests is left on any real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.under_test import CHUNK_TOKENS, Client, Leg
from tests.e2e.site import FREED_WITHIN_S, REAL, Site, standing

pytestmark = REAL
PD = ("prefill", "decode")
ENDLESS_TOKENS = 4000
PROMPT_TOKENS = 6 * CHUNK_TOKENS
STEP_S = 0.2
NOTICED_WITHIN_S = 8.0
"""SGLang looks every 4 s whether the client of a whole answer is still there, and takes no request
id from this protocol by which it could be told."""


def generate(site: Site, tokens: int, *, stream: bool) -> Leg:
    return site.generate(site.client.prompt(tokens), ENDLESS_TOKENS, stream=stream)


def words(site: Site, tokens: int) -> str:
    """Roughly that many tokens, and no prefix that another test has left in a cache."""
    return f"{site.client.rid()} " + " ".join("river" for _ in range(tokens // 3))


def chat(site: Site, tokens: int, *, stream: bool) -> Leg:
    return site.client.chat(site.url, words(site, tokens), ENDLESS_TOKENS, stream=stream)


def messages(site: Site, tokens: int, *, stream: bool) -> Leg:
    body: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": ENDLESS_TOKENS,
        "messages": [{"role": "user", "content": words(site, tokens)}],
        "stream": stream,
    }
    return site.send("/v1/messages", body)


def samples(site: Site, tokens: int, *, stream: bool) -> Leg:
    return site.client.chat(site.url, "Tell me of a river", ENDLESS_TOKENS, stream=stream, n=3)


Asking = Callable[..., Leg]
ASKINGS: dict[str, Asking] = {"generate": generate, "chat": chat}
WHAT = pytest.mark.parametrize("what", ASKINGS)
STREAM = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])


async def leave(leg: Leg) -> None:
    leg.task.cancel()
    await asyncio.wait([leg.task])


async def decodes(site: Site, requests: int = 1) -> None:
    await site.client.until(
        site.client.fleet.decode, lambda load: load["num_running_reqs"] == requests
    )


async def prefills(site: Site, leg: Leg) -> None:
    """In the middle of a long prompt: some of its chunks are done, others are not."""
    await site.client.until(
        site.client.fleet.prefill,
        lambda load: 0 < load["num_waiting_uncached_tokens"] < PROMPT_TOKENS - CHUNK_TOKENS,
    )
    assert not leg.task.done(), leg.finish


@WHAT
@STREAM
async def test_a_client_that_leaves_while_tokens_come_frees_its_slot(
    client: Client, what: str, *, stream: bool
) -> None:
    async with standing(client, *PD) as site:
        leg = ASKINGS[what](site, 30, stream=stream)
        await decodes(site)
        await leave(leg)
        await site.freed()


@WHAT
@STREAM
async def test_a_client_that_leaves_before_its_first_token_frees_both_servers(
    client: Client, what: str, *, stream: bool
) -> None:
    async with standing(client, *PD) as site:
        await client.slow(client.fleet.prefill, STEP_S)
        leg = ASKINGS[what](site, PROMPT_TOKENS, stream=stream)
        await prefills(site, leg)
        await leave(leg)
        await site.freed()


@WHAT
@STREAM
async def test_a_client_that_leaves_the_queue_was_never_sent(
    client: Client, what: str, *, stream: bool
) -> None:
    async with standing(client, *PD, worker={"max_running": 1}) as site:
        first = generate(site, 30, stream=True)
        await first.begun.wait()
        queued = ASKINGS[what](site, 30, stream=stream)
        await site.until(lambda: len(site.gateway.front) == 2)
        await leave(queued)
        await site.until(lambda: len(site.gateway.front) == 1)
        assert (await client.loads(client.fleet.prefill))["num_waiting_reqs"] == 0
        await leave(first)
        await site.freed()


async def test_a_client_that_leaves_takes_all_its_samples_along(client: Client) -> None:
    async with standing(client, *PD) as site:
        leg = samples(site, 30, stream=False)
        await decodes(site, 3)
        await leave(leg)
        await site.freed()


@STREAM
async def test_a_client_that_leaves_anthropic_messages_frees_its_slot(
    client: Client, *, stream: bool
) -> None:
    async with standing(client, *PD) as site:
        leg = messages(site, 30, stream=stream)
        await decodes(site)
        await leave(leg)
        await site.freed(FREED_WITHIN_S if stream else NOTICED_WITHIN_S)


async def test_many_clients_that_leave_at_random_leave_nothing(client: Client) -> None:
    async with standing(client) as site:
        legs = [
            ASKINGS[what](site, client.rng.randint(10, 900), stream=stream)
            for what in ASKINGS
            for stream in (True, False)
            for _ in range(5)
        ]
        for leg in client.rng.sample(legs, len(legs)):
            await asyncio.sleep(client.rng.random() * 0.1)
            await leave(leg)
        await site.freed()


@STREAM
async def test_a_clients_own_abort_ends_its_request_with_what_it_has(
    client: Client, *, stream: bool
) -> None:
    async with standing(client, *PD) as site:
        leg = site.generate(client.prompt(30), ENDLESS_TOKENS, stream=stream, rid="mine")
        await decodes(site)
        assert await client.abort(site.url, "mine") == (200, b"")
        await leg.task
        assert (leg.status, leg.finish["type"]) == (200, "abort")
        assert leg.meta["id"] == "mine"
        await site.freed()


async def test_a_clients_own_abort_reaches_a_prompt_that_is_computed(client: Client) -> None:
    async with standing(client, *PD) as site:
        await client.slow(client.fleet.prefill, STEP_S)
        prompt = client.prompt(PROMPT_TOKENS)
        leg = site.generate(prompt, ENDLESS_TOKENS, stream=False, rid="mine")
        await prefills(site, leg)
        await client.abort(site.url, "mine")
        await asyncio.wait_for(leg.task, 3.0)
        assert leg.finish["type"] == "abort"
        await site.freed()


async def test_an_aborted_id_can_be_used_again(client: Client) -> None:
    async with standing(client, *PD) as site:
        for tokens in (ENDLESS_TOKENS, 5):
            leg = site.generate(client.prompt(30), tokens, rid="mine")
            await leg.begun.wait()
            if tokens == ENDLESS_TOKENS:
                await client.abort(site.url, "mine")
            await leg.task
        assert leg.finish == {"type": "length", "length": 5}, leg.finish
