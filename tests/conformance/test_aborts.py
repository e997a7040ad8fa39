"""How a request is taken back in each of its states, and what that leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conformance.under_test import (
    CHUNK_TOKENS,
    SLOW_S,
    UNIFIED_RUNNING,
    Client,
    FleetUnderTest,
    Leg,
)


def waits(queue: str) -> Any:
    return lambda load: load["disaggregation"][queue] == 1


async def running_pair(client: Client, tokens: int, rid: str) -> tuple[Leg, Leg]:
    prefill, decode = client.pair(client.prompt(40), tokens, rid=rid)
    await decode.begun.wait()
    return prefill, decode


async def test_an_aborted_decode_ends_with_what_it_has(
    client: Client, fleet: FleetUnderTest
) -> None:
    rid = client.rid()
    _, decode = await running_pair(client, 3000, rid)
    assert await client.abort(fleet.decode, rid) == (200, b"")
    await decode.task
    assert (decode.status, decode.done) == (200, True)
    assert decode.finish == {
        "type": "abort",
        "message": "Aborted",
        "status_code": None,
        "err_type": None,
    }
    assert 0 < len(decode.ids) < 3000


async def test_an_abort_frees_the_slot_and_its_tokens(
    client: Client, fleet: FleetUnderTest
) -> None:
    rid = client.rid()
    before = (await client.idle(fleet.decode))["num_used_tokens"]
    await running_pair(client, 3000, rid)
    await client.until(fleet.decode, lambda load: load["num_running_reqs"] == 1)
    await client.abort(fleet.decode, rid)
    load = await client.idle(fleet.decode)
    assert load["num_used_tokens"] == before


async def test_an_abort_acts_within_a_few_steps(client: Client, fleet: FleetUnderTest) -> None:
    rid = client.rid()
    await client.slow(fleet.decode, SLOW_S)
    _, decode = await running_pair(client, 200, rid)
    seen = len(decode.ids)
    await client.abort(fleet.decode, rid)
    await decode.task
    await client.slow(fleet.decode, None)
    assert len(decode.ids) - seen <= 4


async def test_an_unstreamed_abort_is_a_200_with_the_partial_text(
    client: Client, fleet: FleetUnderTest
) -> None:
    both = {"rid": client.rid(), "stream": False, **client.meeting()}
    prompt = client.prompt(20)
    client.generate(fleet.prefill, prompt, 3000, **both)
    decode = client.generate(fleet.decode, prompt, 3000, **both)
    await client.until(fleet.decode, lambda load: load["num_running_reqs"] == 1)
    await client.abort(fleet.decode, both["rid"])
    await decode.task
    assert (decode.status, decode.finish["type"]) == (200, "abort")
    assert len(decode.ids) > 0


async def test_an_aborted_chat_finishes_with_abort(client: Client, fleet: FleetUnderTest) -> None:
    rid = client.rid()
    leg = client.chat(fleet.unified, "hello", 3000, rid=rid)
    await leg.begun.wait()
    await client.abort(fleet.unified, rid)
    await leg.task
    assert leg.chunks[-1]["choices"][0]["finish_reason"] == "abort"
    assert leg.done


async def test_an_unknown_id_is_accepted_and_changes_nothing(
    client: Client, fleet: FleetUnderTest
) -> None:
    rid = client.rid()
    _, decode = await running_pair(client, 60, rid)
    assert await client.abort(fleet.decode, client.rid()) == (200, b"")
    await decode.task
    assert decode.finish["type"] == "length"


async def test_an_abort_in_the_queue_says_so(client: Client, fleet: FleetUnderTest) -> None:
    rid = client.rid()
    await client.slow(fleet.unified, SLOW_S)
    for _ in range(UNIFIED_RUNNING):
        await client.generate(fleet.unified, client.prompt(9), 4000).begun.wait()
    queued = client.generate(fleet.unified, client.prompt(9), 5, rid=rid)
    await client.until(fleet.unified, lambda load: load["queues"]["waiting"] == 1)
    await client.abort(fleet.unified, rid)
    await queued.task
    await client.slow(fleet.unified, None)
    assert queued.finish["type"] == "abort"
    assert queued.finish["message"] == "Abort in waiting queue"


@pytest.mark.parametrize(
    ("role", "queues", "message"),
    [
        ("prefill", ["prefill_bootstrap_queue_reqs"], "Prefill bootstrap failed"),
        (
            "decode",
            ["decode_prealloc_queue_reqs", "decode_transfer_queue_reqs"],
            "Decode transfer failed",
        ),
    ],
)
async def test_a_leg_that_waits_for_its_peer_can_be_aborted(
    client: Client, fleet: FleetUnderTest, role: str, queues: list[str], message: str
) -> None:
    url, rid = getattr(fleet, role), client.rid()
    leg = client.generate(url, client.prompt(9), 5, rid=rid, **client.meeting())
    await client.until(url, lambda load: any(load["disaggregation"][queue] for queue in queues))
    await asyncio.sleep(0.2)
    await client.abort(url, rid)
    await leg.task
    assert (leg.finish["type"], leg.finish["status_code"]) == ("abort", 500)
    assert leg.finish["message"].startswith(message)
    assert "Aborted by AbortReq" in leg.finish["message"]


async def test_a_leaving_client_frees_the_slot(client: Client, fleet: FleetUnderTest) -> None:
    _, decode = await running_pair(client, 3000, client.rid())
    await client.until(fleet.decode, lambda load: load["num_running_reqs"] == 1)
    decode.task.cancel()
    load = await client.until(fleet.decode, lambda load: load["num_running_reqs"] == 0, 3.0)
    assert load["num_used_tokens"] == 0


async def test_a_waiting_decode_leg_that_leaves_takes_its_prefill_leg_along(
    client: Client, fleet: FleetUnderTest
) -> None:
    meeting = client.meeting()
    prompt = client.prompt(9)
    decode = client.generate(fleet.decode, prompt, 5, **meeting)
    await client.until(fleet.decode, waits("decode_transfer_queue_reqs"))
    decode.task.cancel()
    await client.idle(fleet.decode)
    prefill = await client.generated(fleet.prefill, prompt, 5, **meeting)
    assert (prefill.finish["type"], prefill.finish["status_code"]) == ("abort", 500)


async def test_a_prefill_leg_that_leaves_is_not_told_to_decode(
    client: Client, fleet: FleetUnderTest
) -> None:
    meeting, rid = client.meeting(), client.rid()
    prompt = client.prompt(8 * CHUNK_TOKENS)
    decode = client.generate(fleet.decode, prompt, 5, rid=rid, **meeting)
    await client.until(fleet.decode, waits("decode_transfer_queue_reqs"))
    await client.slow(fleet.prefill, 0.2)
    prefill = client.generate(fleet.prefill, prompt, 5, **meeting)
    await asyncio.sleep(0.6)
    prefill.task.cancel()
    await client.slow(fleet.prefill, None)
    await asyncio.sleep(1.0)
    assert not decode.task.done()
    await client.abort(fleet.decode, rid)
    await decode.task
