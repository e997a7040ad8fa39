"""What a server's death does to requests and to the other side, and that it can come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.conformance.under_test import HEARTBEAT_S, MISSED_HEARTBEATS, Client, FleetUnderTest, Leg


@asynccontextmanager
async def killed(fleet: FleetUnderTest, url: str) -> AsyncIterator[None]:
    """Dead inside the block, ready again after it."""
    await fleet.kill(url)
    try:
        yield
    finally:
        await fleet.start(url)


def begins_alike(some: list[int], others: list[int]) -> bool:
    """As far as the shorter one goes."""
    shorter = min(len(some), len(others))
    return some[:shorter] == others[:shorter] != []


async def test_a_killed_decode_server_breaks_its_streams_and_comes_back(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(50)
    _, decode = client.pair(prompt, 3000)
    await decode.begun.wait()
    async with killed(fleet, fleet.decode):
        await decode.task
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.loads(fleet.decode)
    _, again = await client.paired(prompt, 5)
    assert decode.broken
    assert not decode.done
    assert begins_alike(again.ids, decode.ids)


async def test_a_prefill_leg_whose_decode_server_died_can_still_be_aborted(
    client: Client, fleet: FleetUnderTest
) -> None:
    rid = client.rid()
    async with killed(fleet, fleet.decode):
        prefill = client.generate(fleet.prefill, client.prompt(9), 5, rid=rid, **client.meeting())
        await client.until(fleet.prefill, lambda load: load["num_waiting_reqs"] == 1)
        await asyncio.sleep(0.2)
        await client.abort(fleet.prefill, rid)
        await prefill.task
    assert (prefill.finish["type"], prefill.finish["status_code"]) == ("abort", 500)


async def left_waiting(client: Client) -> Leg:
    """A decode leg whose prefill leg never comes."""
    decode = client.fleet.decode
    leg = client.generate(decode, client.prompt(9), 5, **client.meeting())
    await client.until(
        decode, lambda load: load["disaggregation"]["decode_transfer_queue_reqs"] == 1
    )
    return leg


async def test_a_decode_leg_learns_of_its_prefill_servers_death_by_heartbeat(
    client: Client, fleet: FleetUnderTest
) -> None:
    await client.paired(client.prompt(9), 2)
    waiting = await left_waiting(client)
    async with killed(fleet, fleet.prefill):
        async with asyncio.timeout((MISSED_HEARTBEATS + 1) * HEARTBEAT_S):
            await waiting.task
    assert waiting.finish["status_code"] == 500
    assert "Lost connection with prefill instance" in waiting.finish["message"]


async def test_a_decode_outlives_its_prefill_server(client: Client, fleet: FleetUnderTest) -> None:
    _, decode = client.pair(client.prompt(40), 800)
    await decode.begun.wait()
    async with killed(fleet, fleet.prefill):
        await decode.task
    assert decode.finish == {"type": "length", "length": 800}


async def known_to_each_other(client: Client) -> None:
    """What an earlier test has done to the connection is over: the second pair is not lost."""
    for _ in range(2):
        _, met = await client.paired(client.prompt(9), 2)
    assert met.finish["type"] == "length"


async def test_a_restart_that_heartbeats_have_missed_costs_no_pair(
    client: Client, fleet: FleetUnderTest
) -> None:
    await known_to_each_other(client)
    witness = await left_waiting(client)
    async with killed(fleet, fleet.prefill):
        await witness.task
    _, decode = await client.paired(client.prompt(9), 2)
    assert "Lost connection with prefill instance" in witness.finish["message"]
    assert decode.finish == {"type": "length", "length": 2}


async def test_a_restart_that_heartbeats_have_not_missed_costs_the_next_pair(
    client: Client, fleet: FleetUnderTest
) -> None:
    """A leg that waits tells which it was: where its server starts slowly, it is missed."""
    await known_to_each_other(client)
    witness = await left_waiting(client)
    async with killed(fleet, fleet.prefill):
        pass
    unnoticed = not witness.task.done()
    lost = await client.paired(client.prompt(9), 2)
    _, again = await client.paired(client.prompt(9), 2)
    statuses = [leg.finish.get("status_code") for leg in lost]
    assert statuses == ([500, 500] if unnoticed else [None, None])
    assert again.finish == {"type": "length", "length": 2}


async def test_an_address_where_nothing_listens_fails_the_decode_leg(
    client: Client, fleet: FleetUnderTest
) -> None:
    nowhere = {**client.meeting(), "bootstrap_port": 1}
    leg = await client.generated(fleet.decode, client.prompt(9), 5, **nowhere)
    assert (leg.finish["type"], leg.finish["status_code"]) == ("abort", 500)
    assert leg.finish["message"].startswith("Decode handshake failed")
