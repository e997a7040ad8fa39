"""Live servers that share a GPU: the offline one stands still, and its requests do not notice."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.config import Classes, Colocation, Online, Timeouts
from policies.events import WorkerUp
from policies.types import Pool, Role
from tests.gateway.gateway_under_test import OFFLINE, Site, generate, spec, standing

PEERS = (
    spec("u1", Role.UNIFIED, host="gpu"),
    spec("u2", Role.UNIFIED, host="gpu", pool=Pool.RELAXED),
)
ENTRIES = {"u1": {"host": "gpu"}, "u2": {"host": "gpu"}}
HASTE = Classes(online=Online(ttft_ms=60_000, tpot_ms=1))
"""A target that no step keeps."""


def stage(**sections: Any) -> Any:
    return standing(PEERS, entries=ENTRIES, **{"classes": HASTE} | sections)


def stands_still(site: Site) -> bool:
    return site.fleet["u2"].engine.paused == "in_place"


async def test_the_offline_server_stands_still_while_online_tokens_come_too_slowly() -> None:
    async with stage() as site:
        alone = await site.ask("/generate", generate(120), OFFLINE)
        offline = site.ask("/generate", generate(120), OFFLINE)
        async with site.meanwhile(offline) as asked:
            await site.until("it runs", lambda: site.gateway.core.ledgers["u2"].decodes)
            with capture_logs() as told:
                async with site.meanwhile(site.ask("/generate", generate(150, stream=True))):
                    await site.until("it stands still", lambda: stands_still(site))
                await site.until("it goes on", lambda: not stands_still(site))
            assert (await asked).body["output_ids"] == alone.body["output_ids"]
        assert [it["event"] for it in told if it["event"] in {"paused", "continued"}] == [
            "paused",
            "continued",
        ]


async def test_a_pause_longer_than_the_patience_between_tokens_is_no_failure() -> None:
    timeouts = Timeouts(between_tokens_s=0.5, first_token_offline_s=2.0, per_token_s=0.01)
    async with stage(timeouts=timeouts, colocation=Colocation(longest_pause_s=3.0)) as site:
        offline = site.ask("/generate", generate(60, stream=True), OFFLINE)
        async with site.meanwhile(offline) as asked:
            await site.until("it runs", lambda: site.gateway.core.ledgers["u2"].decodes)
            async with site.meanwhile(site.ask("/generate", generate(2000, stream=True))):
                await site.until("it stands still", lambda: stands_still(site))
                await site.until("it goes on", lambda: not stands_still(site))
            assert (await asked).status == 200
        line = next(it for it in site.lines if it["class"] == "offline")
        assert (line["outcome"], line["preemptions"], line["attempts"]) == ("ok", 1, 1)


async def test_no_server_is_left_standing_still_when_the_gateway_ends() -> None:
    async with stage() as site:
        offline = site.ask("/generate", generate(500), OFFLINE)
        async with site.meanwhile(offline):
            await site.until("it runs", lambda: site.gateway.core.ledgers["u2"].decodes)
            async with site.meanwhile(site.ask("/generate", generate(500, stream=True))):
                await site.until("it stands still", lambda: stands_still(site))
                await site.gateway._let_all_go()
                assert not stands_still(site)


@pytest.mark.parametrize("says", ["u1", "u2"])
async def test_a_server_that_stands_still_when_the_gateway_comes_goes_on(says: str) -> None:
    async with stage() as site:
        site.fleet[says].engine.pause("in_place")
        fresh = site.gateway.backend.standstill
        fresh._servers.clear()
        site.gateway.driver.post(WorkerUp(site.core.ledgers[says].worker))
        await site.until("it goes on", lambda: site.fleet[says].engine.paused is None)
        assert fresh.is_settled
