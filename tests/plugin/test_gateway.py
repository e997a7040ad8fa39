"""The gateway in front of engines that have the plug-in: it finds it, uses it and lends it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.config import Cost
from gateway.plugin_settings import PluginSettings
from tests.e2e.site import OFFLINE, over, standing
from tests.plugin.ground import Trial

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.timeout(60, func_only=True),
    pytest.mark.parametrize("ground", ["overlapping", "pair"], indirect=True),
]
LEASE_S = 1.0


async def test_it_is_found_used_and_given_back(trial: Trial) -> None:
    names = ("prefill", "decode") if trial.ground.is_pair else ("unified",)
    asks = trial.asks(4, tokens=40)
    stock = await trial.stock(asks)
    plugin = PluginSettings(lease_s=LEASE_S)
    cost = replace(Cost(), model="Llama-3.1-8B", device="h100")
    async with standing(trial.client, *names, plugin=plugin, cost=cost) as site:
        ledgers = site.gateway.core.ledgers
        assert {name: set(ledger.worker.engine) for name, ledger in ledgers.items()} == {
            name: {"decode", "online-first", "prefill", "reports"} for name in names
        }
        assert (await trial.state())["mode"] == "online-first"
        legs = [
            site.generate(ask.ids, ask.tokens, headers=OFFLINE if ask.offline else None)
            for ask in asks
        ]
        got = [(await over(leg)).ids for leg in legs]
        assert [i for i, ids in stock.items() if got[i] != ids] == []
        steps = ledgers[names[-1]].steps
        assert steps is not None
        await site.until(lambda: steps.decode.steps > 20)
        assert b'slackwater_worker_engine{feature="decode"' in site.gateway.metrics.render()
    await asyncio.sleep(1.2 * LEASE_S)
    await trial.wave(asks)
    assert (await trial.state())["mode"] == "all"
