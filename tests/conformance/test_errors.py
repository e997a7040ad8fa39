"""Where an error is told: in the status line or inside a stream that began as a success."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conformance.under_test import (
    RENDEZVOUS_TIMEOUT_S,
    SLOW_S,
    UNIFIED_QUEUED,
    UNIFIED_RUNNING,
    Client,
    FleetUnderTest,
)

TOO_LONG = 20_000
"""Tokens, beyond the model's context of 16,384."""


async def test_a_body_of_the_wrong_shape_is_a_400(client: Client, fleet: FleetUnderTest) -> None:
    status, body = await client.post(fleet.unified + "/generate", {"sampling_params": {}})
    assert status == 400
    assert "error" in body


async def test_too_long_a_prompt_is_a_400(client: Client, fleet: FleetUnderTest) -> None:
    leg = await client.generated(fleet.unified, client.prompt(TOO_LONG), 2, stream=False)
    assert leg.status == 400
    assert "longer than the model's context length" in leg.finish["message"]


async def test_in_a_stream_too_long_a_prompt_is_an_error_inside_a_200(
    client: Client, fleet: FleetUnderTest
) -> None:
    leg = await client.generated(fleet.unified, client.prompt(TOO_LONG), 2)
    assert (leg.status, leg.done) == (200, True)
    assert leg.last["error"]["code"] == 400


async def test_a_chat_error_is_a_400_in_openai_terms(client: Client, fleet: FleetUnderTest) -> None:
    body = {"model": "tiny", "messages": [], "max_tokens": 3}
    status, told = await client.post(fleet.unified + "/v1/chat/completions", body)
    assert status == 400
    assert told["object"] == "error"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prefill_leg_without_a_peer_times_out(
    client: Client, fleet: FleetUnderTest, *, stream: bool
) -> None:
    leg = await client.generated(
        fleet.prefill, client.prompt(9), 5, stream=stream, **client.meeting()
    )
    assert leg.status == (200 if stream else 500)
    assert leg.finish["status_code"] == 500
    assert f"timed out after {RENDEZVOUS_TIMEOUT_S}" in leg.finish["message"]


async def test_a_decode_leg_without_a_peer_times_out(client: Client, fleet: FleetUnderTest) -> None:
    leg = await client.generated(fleet.decode, client.prompt(9), 5, **client.meeting())
    assert (leg.status, leg.finish["status_code"]) == (200, 500)
    assert leg.finish["message"].startswith("Decode transfer failed")


async def filled(client: Client, fleet: FleetUnderTest) -> None:
    """Every slot and every place in the unified server's queue, at priority 1."""
    await client.slow(fleet.unified, SLOW_S)
    for _ in range(UNIFIED_RUNNING):
        await client.generate(fleet.unified, client.prompt(9), 4000, priority=1).begun.wait()
    for _ in range(UNIFIED_QUEUED):
        client.generate(fleet.unified, client.prompt(9), 4000, priority=1)
    await client.until(fleet.unified, lambda load: load["queues"]["waiting"] == UNIFIED_QUEUED)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_full_queue_refuses_with_503(
    client: Client, fleet: FleetUnderTest, *, stream: bool
) -> None:
    await filled(client, fleet)
    leg = await client.generated(fleet.unified, client.prompt(9), 2, stream=stream, priority=0)
    await client.slow(fleet.unified, None)
    assert leg.status == (200 if stream else 503)
    assert (leg.finish["message"], leg.finish["status_code"]) == ("The request queue is full.", 503)


async def test_a_higher_priority_takes_a_place_in_the_queue(
    client: Client, fleet: FleetUnderTest
) -> None:
    await filled(client, fleet)
    evicted: list[Any] = [leg for leg in client.legs if not leg.begun.is_set()]
    client.generate(fleet.unified, client.prompt(9), 4000, priority=2)
    await asyncio.wait([leg.task for leg in evicted], return_when=asyncio.FIRST_COMPLETED)
    await client.slow(fleet.unified, None)
    finishes = [leg.finish for leg in evicted if leg.task.done()]
    assert [finish["status_code"] for finish in finishes] == [503]
    assert "aborted by a higher priority request" in finishes[0]["message"]
