"""Real servers give offline work up for online work, and the offline client never notices."""

from __future__ import annotations

import asyncio
from statistics import median
from typing import Any

import pytest

from gateway.config import Classes, Online
from policies.events import Reason, Recall
from policies.types import Kind
from tests.conformance.under_test import CHUNK_TOKENS, Client, Leg
from tests.e2e.site import OFFLINE, REAL, Site, over, standing

pytestmark = [*REAL[:1], pytest.mark.timeout(150, func_only=True)]
PAIRS = ("prefill", "decode", "relaxed")
REQUESTS = 20
TOKENS = 40
STEP_S = 0.01
LONG_STEP_S = 0.1
"""Long enough that a poll of the load report is quick beside it."""
LONG_TOKENS = 10 * CHUNK_TOKENS
CHUNK_S = 0.4
"""The floor of a chunk, long beside what it waits for a core of a busy machine."""
TTFT_MS = 1500.0
"""An online prompt behind ten chunks would miss it."""


def preemptions(site: Site) -> int:
    return site.gateway.core.accounts.preemptions.total()


async def recall(site: Site) -> None:
    before = preemptions(site)
    (job_id,) = site.gateway.backend._live
    site.gateway.driver.post(Recall(job_id))
    await site.until(lambda: preemptions(site) > before)


def made(site: Site) -> int:
    """Tokens of the attempts under way."""
    return sum(attempt.tokens for attempt in site.gateway.backend._live.values())


async def slowed(client: Client, step_s: float | None) -> None:
    for url in (client.fleet.decode, client.fleet.relaxed):
        await client.slow(url, step_s)


async def preempted(site: Site, leg: Leg, times: int, tokens: int) -> Leg:
    """It is taken off so often, each time after at least so many more tokens."""
    for _ in range(times):
        await site.until(lambda: made(site) >= tokens)
        await recall(site)
    return await over(leg)


@pytest.mark.parametrize("way", ["streamed", "whole"])
async def test_preempted_requests_end_with_the_tokens_of_an_undisturbed_run(
    client: Client, way: str
) -> None:
    async with standing(client, *PAIRS) as site:
        await slowed(client, STEP_S)
        for number in range(REQUESTS // 2):
            prompt = client.prompt(30)
            times, tokens = (5, 4) if number == 0 else (1, client.rng.randint(1, TOKENS - 5))
            leg = site.generate(prompt, TOKENS, stream=way == "streamed", headers=OFFLINE)
            await preempted(site, leg, times, tokens)
            assert leg.ids == await site.alone(prompt, TOKENS)
            assert leg.finish == {"type": "length", "length": TOKENS}
            assert site.lines[-1]["preemptions"] == times
        await slowed(client, None)
        await site.freed()


SETTLED: dict[str, Any] = {
    "temperature": 0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""Nothing is left to the model's own defaults, of which a server does not tell."""


@pytest.mark.parametrize("way", ["streamed", "whole"])
async def test_preempted_chats_end_with_the_text_of_an_undisturbed_run(
    client: Client, way: str
) -> None:
    stream = way == "streamed"
    async with standing(client, *PAIRS) as site:
        await slowed(client, STEP_S)
        for times in (1, 3, 5):
            said = f"Tell me of {client.rng.random()}"
            leg = client.chat(site.url, said, TOKENS, stream=stream, headers=OFFLINE, **SETTLED)
            await preempted(site, leg, times, 4)
            alone = client.chat(client.fleet.unified, said, TOKENS, stream=False, **SETTLED)
            answer = (await over(alone)).body
            assert text_of(leg) == answer["choices"][0]["message"]["content"]
            assert site.lines[-1]["preemptions"] == times
            assert site.lines[-1]["tokens"] == answer["usage"]["completion_tokens"] == TOKENS
        await slowed(client, None)
        await site.freed()


def text_of(leg: Leg) -> str:
    if not leg.chunks:
        return str(leg.body["choices"][0]["message"]["content"])
    choices = [choice for chunk in leg.chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_a_decode_slot_is_free_within_two_steps_of_the_decision(client: Client) -> None:
    async with standing(client, "prefill", "relaxed") as site:
        ledgers, clock = site.gateway.core.ledgers, asyncio.get_running_loop().time
        waits_s = []
        await client.slow(client.fleet.relaxed, LONG_STEP_S)
        step_s = await client.step_s(site.url)  # the floor, and what the model takes
        for number in range(8):
            await client.slow(client.fleet.relaxed, LONG_STEP_S)
            leg = site.generate(client.prompt(30), TOKENS, headers=OFFLINE)
            await site.until(lambda: made(site) >= 2)
            # A report lags behind what runs.
            await client.until(client.fleet.relaxed, lambda load: load["num_running_reqs"])
            for ledger in ledgers.values():
                ledger.draining = True  # it is to wait, so that the slot can be seen to be free
            # A report comes as a step begins: decisions are made in all parts of one.
            await asyncio.sleep(number / 8 * step_s)
            began_s = clock()
            await recall(site)
            await client.until(
                client.fleet.relaxed, lambda load: not load["num_running_reqs"], every_s=0.002
            )
            waits_s.append(clock() - began_s)
            for ledger in ledgers.values():
                ledger.draining = False
            await client.slow(client.fleet.relaxed, None)
            await over(leg)
            assert len(leg.ids) == TOKENS
        assert median(waits_s) <= 2 * step_s
        assert max(waits_s) <= 3 * step_s


async def first_token_s(site: Site, tokens: int) -> float:
    began_s = asyncio.get_running_loop().time()
    leg = site.generate(site.client.prompt(tokens), 4)
    await leg.begun.wait()
    took_s = asyncio.get_running_loop().time() - began_s
    await over(leg)
    assert leg.status == 200
    return took_s


async def long_one_begun(site: Site, chunk_s: float) -> Leg:
    """Computed for one chunk's time, and no further than half when this process runs again."""
    ledger, clock = site.gateway.core.ledgers["prefill"], asyncio.get_running_loop().time
    while True:
        leg = site.generate(site.client.prompt(LONG_TOKENS), 8, headers=OFFLINE)
        await site.until(lambda: ledger.offline.prefills)
        await asyncio.sleep(chunk_s)
        if ledger.prefill_rate.under_way(round(clock() * 1e6)) < LONG_TOKENS / 2:
            return leg
        await over(leg)


async def test_an_online_prompt_does_not_wait_behind_a_long_offline_one(client: Client) -> None:
    classes = Classes(online=Online(ttft_ms=TTFT_MS))
    async with standing(client, *PAIRS, classes=classes) as site:
        await client.slow(client.fleet.prefill, CHUNK_S)
        chunk_s = median([await first_token_s(site, CHUNK_TOKENS) for _ in range(3)])
        alone_s = max([await first_token_s(site, 200) for _ in range(3)])
        waits_s = []
        for _ in range(3):
            long = await long_one_begun(site, chunk_s)
            waits_s.append(await first_token_s(site, 200))
            await over(long)
            assert len(long.ids) == 8
        assert median(waits_s) <= 2 * chunk_s + alone_s
        taken = site.gateway.core.accounts.preemptions
        assert taken[Kind.OFFLINE, "prefill", Reason.ONLINE_PREFILL] >= 3
        await client.slow(client.fleet.prefill, None)
        await site.freed()
