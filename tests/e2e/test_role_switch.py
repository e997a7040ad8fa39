"""A real server takes another role under the gateway's hands while offline work runs on it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from policies.events import Reason, SwitchWanted
from policies.types import Kind, Role
from tests.conformance.test_roles import TO_DECODE, switch
from tests.conformance.under_test import Client, Leg
from tests.e2e.site import OFFLINE, REAL, SHARED, Site, over, standing

pytestmark = [*REAL[:1], pytest.mark.timeout(120, func_only=True)]
PAIRS = ("prefill", "decode", "relaxed")
OFFLINE_TOKENS = 150
STEP_S = 0.02
SERVES_WITHIN_S = 2.0
"""From the decision, with offline requests on the server."""


@asynccontextmanager
async def restored(client: Client) -> AsyncIterator[None]:
    """Whatever happens, the server decodes again for those that come after."""
    url = client.fleet.relaxed
    try:
        yield
    finally:
        _, model = await client.get(url + "/model_info")
        if model["disaggregation_mode"] != "decode":
            await switch(client, url, TO_DECODE)


class Work:
    """Offline requests that go on all the time, and what each should have been answered."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._prompts = [site.client.prompt(60) for _ in range(3)]
        self._alone: list[list[int]] = []
        self._legs: list[tuple[int, Leg]] = []

    async def prepare(self) -> None:
        self._alone = [await self._site.alone(it, OFFLINE_TOKENS) for it in self._prompts]
        for url in (self._site.client.fleet.decode, self._site.client.fleet.relaxed):
            await self._site.client.slow(url, STEP_S)

    async def begin(self) -> None:
        """Returns once all of them are in their midst."""
        legs = [
            self._site.generate(prompt, OFFLINE_TOKENS, headers=OFFLINE) for prompt in self._prompts
        ]
        self._legs += enumerate(legs)
        await self._site.until(lambda: all(len(leg.chunks) >= 5 for leg in legs))

    async def check(self) -> None:
        """Each has ended once, token for token as it would have without any switch."""
        for number, leg in self._legs:
            await over(leg)
            assert leg.finish == {"type": "length", "length": OFFLINE_TOKENS}, leg.last
            assert leg.ids == self._alone[number]


async def served(site: Site, name: str, *, place: int) -> None:
    """Asks until this server has prefilled a request (place 0), or decoded one (place 1)."""
    prompt = site.client.prompt(30)
    alone = await site.alone(prompt, 4)
    workers: list[str] = []
    async with asyncio.timeout(20.0):
        while name not in workers:
            legs = [site.generate(prompt, 4) for _ in range(3)]
            for leg in legs:
                await over(leg)
                assert leg.ids == alone
            workers = [leg.headers["x-slackwater-worker"].split(",")[place] for leg in legs]


async def becomes_s(site: Site, role: Role, *, place: int) -> float:
    """From the decision until it serves in that role."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    site.gateway.driver.post(SwitchWanted("relaxed", role, "asked for"))
    await site.until(lambda: "relaxed" in site.gateway.core.switching.moves)
    await served(site, "relaxed", place=place)
    assert site.gateway.core.ledgers["relaxed"].worker.role is role
    return loop.time() - began_s


async def test_a_server_serves_in_another_role_soon_and_back_while_offline_work_runs(
    client: Client,
) -> None:
    async with restored(client), standing(client, *PAIRS, policies=SHARED) as site:
        work = Work(site)
        await work.prepare()
        await work.begin()
        there_s = await becomes_s(site, Role.PREFILL, place=0)
        await work.begin()
        back_s = await becomes_s(site, Role.DECODE, place=1)
        await work.check()
        sys.stdout.write(f"serves as prefill in {there_s:.2f} s, as decode in {back_s:.2f} s\n")
        taken = site.gateway.core.accounts.preemptions
        assert taken[Kind.OFFLINE, "relaxed", Reason.ROLE_SWITCH] >= 1
        online = [line for line in site.lines if line["class"] == "online"]
        assert {line["attempts"] for line in online} == {1}
        assert max(there_s, back_s) < SERVES_WITHIN_S
        for url in (client.fleet.decode, client.fleet.relaxed):
            await client.slow(url, None)
        await site.freed()
