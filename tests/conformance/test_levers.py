"""What a gateway builds preemption on: resumes, kept chunks, slices, and room for the urgent."""

from __future__ import annotations

import asyncio

import pytest

from tests.conformance.under_test import CHUNK_TOKENS, Client, FleetUnderTest

LONG_TOKENS = 8 * CHUNK_TOKENS
STEP_S = 0.2
"""A chunk's floor while an urgent prompt waits."""


@pytest.mark.parametrize("cut", [1, 7, 20, 39])
async def test_a_resume_continues_with_the_same_tokens(
    client: Client, fleet: FleetUnderTest, cut: int
) -> None:
    prompt = client.prompt(1500)
    _, whole = await client.paired(prompt, 40)
    _, resumed = await client.paired(prompt + whole.ids[:cut], 40 - cut, decode=fleet.relaxed)
    assert whole.ids[:cut] + resumed.ids == whole.ids


async def test_a_resume_finds_its_prompt_in_the_cache(client: Client) -> None:
    prompt = client.prompt(1500)
    _, whole = await client.paired(prompt, 20)
    prefill, _ = await client.paired(prompt + whole.ids[:10], 10)
    assert 1499 <= prefill.meta["cached_tokens"] <= 1501


async def test_an_aborted_decode_resumes_where_it_stopped(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt, rid = client.prompt(200), client.rid()
    alone = await client.generated(fleet.unified, prompt, 400)
    _, victim = client.pair(prompt, 400, rid=rid)
    await victim.begun.wait()
    await client.abort(fleet.decode, rid)
    await victim.task
    kept = victim.ids
    _, resumed = await client.paired(prompt + kept, 400 - len(kept))
    assert 0 < len(kept) < 400
    assert kept + resumed.ids == alone.ids


async def test_a_unified_server_keeps_what_an_aborted_request_generated(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt, rid = client.prompt(200), client.rid()
    victim = client.generate(fleet.unified, prompt, 2000, rid=rid)
    await victim.begun.wait()
    await asyncio.sleep(0.3)
    await client.abort(fleet.unified, rid)
    await victim.task
    resumed = await client.generated(fleet.unified, prompt + victim.ids, 2)
    assert resumed.meta["cached_tokens"] >= 200 + len(victim.ids) - 2


async def aborted_in_mid_chunk(client: Client, fleet: FleetUnderTest, prompt: list[int]) -> None:
    """After some of its chunks, before the last."""
    rid = client.rid()
    before = (await client.idle(fleet.prefill))["total_prefill_uncached_tokens"]
    await client.slow(fleet.prefill, 0.15)
    prefill, decode = client.pair(prompt, 4, rid=rid)
    await client.until(
        fleet.prefill,
        lambda load: load["total_prefill_uncached_tokens"] >= before + 3 * CHUNK_TOKENS,
    )
    await client.abort(fleet.prefill, rid)
    await client.abort(fleet.decode, rid)
    await asyncio.gather(prefill.task, decode.task)
    await client.slow(fleet.prefill, None)
    assert decode.finish["type"] == "abort"


async def test_an_offline_prefill_aborted_in_mid_chunk_keeps_its_finished_chunks(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(LONG_TOKENS)
    await aborted_in_mid_chunk(client, fleet, prompt)
    prefill, _ = await client.paired(prompt, 2)
    cached = prefill.meta["cached_tokens"]
    assert 3 * CHUNK_TOKENS <= cached < LONG_TOKENS
    assert cached % CHUNK_TOKENS == 0


async def test_an_aborted_prefill_leaves_both_servers_empty(
    client: Client, fleet: FleetUnderTest
) -> None:
    await aborted_in_mid_chunk(client, fleet, client.prompt(LONG_TOKENS))
    assert (await client.idle(fleet.prefill))["num_used_tokens"] == 0
    assert (await client.idle(fleet.decode))["num_used_tokens"] == 0


@pytest.mark.parametrize("preempted", [False, True])
async def test_an_urgent_prompt_waits_for_a_long_one_unless_that_is_aborted(
    client: Client, fleet: FleetUnderTest, *, preempted: bool
) -> None:
    rid = client.rid()
    await client.slow(fleet.prefill, STEP_S)
    client.pair(client.prompt(LONG_TOKENS), 2, rid=rid, decode=fleet.relaxed)
    await asyncio.sleep(2 * STEP_S)
    began_s = asyncio.get_running_loop().time()
    if preempted:
        await client.abort(fleet.prefill, rid)
        await client.abort(fleet.relaxed, rid)
    _, urgent = client.pair(client.prompt(200), 2)
    await urgent.begun.wait()
    waited_s = asyncio.get_running_loop().time() - began_s
    await client.slow(fleet.prefill, None)
    await urgent.task
    assert urgent.finish["type"] == "length"
    assert (waited_s < 4 * STEP_S) is preempted


async def test_slices_of_a_long_prompt_build_on_one_another(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(4 * CHUNK_TOKENS)
    cached = []
    for end in range(CHUNK_TOKENS, len(prompt) + 1, CHUNK_TOKENS):
        prefill, _ = await client.paired(prompt[:end], 1, decode=fleet.relaxed)
        cached.append(prefill.meta["cached_tokens"])
    assert cached == [0, CHUNK_TOKENS, 2 * CHUNK_TOKENS, 3 * CHUNK_TOKENS]


async def test_a_slice_without_a_peer_leaves_nothing_in_the_cache(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(800)
    peerless = {**client.meeting(), "bootstrap_host": "2.2.2.2"}
    slice_ = await client.generated(fleet.prefill, prompt, 1, **peerless)
    prefill, _ = await client.paired(prompt, 2)
    assert slice_.status == 200
    assert prefill.meta["cached_tokens"] == 0
