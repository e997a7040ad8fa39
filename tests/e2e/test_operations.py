"""What an operator does while real servers work: reloads and drains."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tests.conformance.under_test import Client
from tests.e2e.site import QUICK, REAL, SHARED, standing

pytestmark = REAL
TOKENS = 150


async def test_servers_come_and_go_by_reload_and_no_request_notices(client: Client) -> None:
    async with standing(client, "prefill", "decode", policies=SHARED) as site:
        prompts = [client.prompt(client.rng.randint(20, 200)) for _ in range(12)]
        undisturbed = [await site.alone(prompt, TOKENS) for prompt in prompts]
        legs = []
        for turn, prompt in enumerate(prompts):
            legs.append(site.generate(prompt, TOKENS))
            await asyncio.sleep(0.1)
            names = ("decode", "relaxed", "unified") if turn % 2 else ("decode", "relaxed")
            workers = site.entries("prefill", *names[turn % len(names) :])
            if turn % 3 == 0:
                site.gateway.adopt(replace(site.config, worker=workers))
        await asyncio.wait([leg.task for leg in legs])
        assert [leg.ids for leg in legs] == undisturbed


async def test_a_drain_lets_streams_end_and_refuses_new_ones(client: Client) -> None:
    prompt = client.prompt(40)
    async with standing(client, "prefill", "decode") as site:
        undisturbed = await site.alone(prompt, TOKENS)
        leg = site.generate(prompt, TOKENS)
        await leg.begun.wait()
        async with asyncio.TaskGroup() as tasks:
            draining = tasks.create_task(site.gateway.drain())
            await asyncio.sleep(0)
            late = await site.generated(client.prompt(9), 3)
            await asyncio.wait_for(draining, 10.0)
        assert (late.status, late.body["error"]["code"]) == (503, "gateway_draining")
        assert leg.ids == undisturbed


async def test_a_drain_cuts_off_what_does_not_end_in_time(client: Client) -> None:
    server = replace(QUICK.server, drain_s=0.3)
    async with standing(client, "prefill", "decode", server=server) as site:
        leg = site.generate(client.prompt(40), 4000)
        await leg.begun.wait()
        await asyncio.wait_for(site.gateway.drain(), 2.0)
        await leg.task
        assert leg.last["error"]["code"] == "gateway_draining"
        await site.freed()
