"""An online prompt goes before an offline one in its chunks, which goes on and loses nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.conformance.under_test import Leg
from tests.plugin.ground import CHUNK_TOKENS, Ask, Trial

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.timeout(120, func_only=True),
    pytest.mark.parametrize("ground", ["unified", "overlapping", "pair"], indirect=True),
]
LONG_TOKENS = 12 * CHUNK_TOKENS
CHUNK_S = 0.25
"""The floor of a prefill step, so that a slow machine too acts in the midst of the long prompt."""


async def under_way(trial: Trial, ask: Ask, rid: str = "") -> Leg:
    """Some of its chunks are computed."""
    steps = (await trial.state(trial.ground.prefill))["steps"]
    leg = trial.send(ask, rid=rid or trial.client.rid())
    await trial.until("steps", steps + 2, trial.ground.prefill)
    return leg


@pytest.mark.parametrize("chunks", [0.5, 3])
async def test_an_online_prompt_goes_first_and_both_get_their_tokens(
    trial: Trial, chunks: float
) -> None:
    long = Ask(trial.client.prompt(LONG_TOKENS), 6, offline=True)
    short = Ask(trial.client.prompt(round(chunks * CHUNK_TOKENS)), 6)
    prefill = trial.ground.prefill
    await trial.slow(CHUNK_S)
    before = await trial.state(prefill)
    first = await under_way(trial, long)
    second = trial.send(short)
    await second.begun.wait()
    assert not first.begun.is_set()
    await trial.slow(None)
    await asyncio.gather(first.task, second.task)
    assert [leg.finish["type"] for leg in (first, second)] == ["length", "length"]
    after = await trial.state(prefill)
    assert after["displaced"] == before["displaced"] + 1
    assert after["resumed"] == before["resumed"] + 1
    assert after["aside"] == 0
    await trial.slow(None)
    await trial.set(url=prefill, displace=0)
    for url in {prefill, trial.ground.url}:
        await trial.client.idle(url)
        await trial.client.post(url + "/flush_cache", {})
    assert await trial.wave([long]) == [first.ids]
    assert await trial.wave([short]) == [second.ids]


async def test_an_online_prompt_displaces_no_other_online_one(trial: Trial) -> None:
    long, short = Ask(trial.client.prompt(LONG_TOKENS), 3), Ask(trial.client.prompt(20), 3)
    before = await trial.state(trial.ground.prefill)
    await trial.slow(CHUNK_S)
    legs = [await under_way(trial, long), trial.send(short)]
    await trial.waits(trial.ground.prefill)
    await trial.slow(None)
    await asyncio.gather(*(leg.task for leg in legs))
    assert (await trial.state(trial.ground.prefill))["displaced"] == before["displaced"]


async def test_switched_off_it_displaces_nobody(trial: Trial) -> None:
    long, short = (
        Ask(trial.client.prompt(LONG_TOKENS), 3, offline=True),
        Ask(trial.client.prompt(20), 3),
    )
    prefill = trial.ground.prefill
    before = await trial.state(prefill)
    await trial.set(url=prefill, displace=0)
    await trial.slow(CHUNK_S)
    legs = [await under_way(trial, long), trial.send(short)]
    await trial.waits(trial.ground.prefill)
    await trial.slow(None)
    await asyncio.gather(*(leg.task for leg in legs))
    assert (await trial.state(prefill))["displaced"] == before["displaced"]


async def test_a_prompt_put_aside_can_be_aborted_and_leaves_nothing(trial: Trial) -> None:
    long = Ask(trial.client.prompt(LONG_TOKENS), 6, offline=True)
    prefill, rid = trial.ground.prefill, trial.client.rid()
    await trial.slow(CHUNK_S)
    first = await under_way(trial, long, rid)
    online = [trial.send(Ask(trial.client.prompt(4 * CHUNK_TOKENS), 2)) for _ in range(2)]
    await trial.until("aside", 1, prefill)
    for url in {prefill, trial.ground.url}:
        await trial.client.abort(url, rid)
    await first.task
    await trial.slow(None)
    await asyncio.gather(*(leg.task for leg in online))
    assert first.finish["type"] == "abort"
    assert [len(leg.ids) for leg in online] == [2, 2]
    await trial.client.idle(prefill)
    assert (await trial.state(prefill))["aside"] == 0


async def test_a_pause_with_a_prompt_aside_loses_nothing(trial: Trial) -> None:
    # A prefill server keeps what is in its chunks over any pause.
    how = "in_place" if trial.ground.is_pair else "retract"
    long = Ask(trial.client.prompt(8 * CHUNK_TOKENS), 5, offline=True)
    online = replace(long, ids=trial.client.prompt(4 * CHUNK_TOKENS), offline=False)
    prefill = trial.ground.prefill
    await trial.slow(CHUNK_S)
    first = await under_way(trial, long)
    second = trial.send(online)
    await trial.until("aside", 1, prefill)
    await trial.client.post(prefill + "/pause_generation", {"mode": how})
    await asyncio.sleep(0.1)
    await trial.client.post(prefill + "/continue_generation", {})
    await trial.slow(None)
    await asyncio.gather(first.task, second.task)
    assert [first.ids, second.ids] == [(await trial.wave([ask]))[0] for ask in (long, online)]
