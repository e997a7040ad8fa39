"""What `priority` does where it is enabled: it orders queues, and on unified servers displaces."""

from __future__ import annotations

import asyncio

from tests.conformance.under_test import (
    RELAXED_RUNNING,
    SLOW_S,
    UNIFIED_RUNNING,
    Client,
    FleetUnderTest,
)


async def test_the_more_urgent_of_two_queued_requests_runs_first(
    client: Client, fleet: FleetUnderTest
) -> None:
    await client.slow(fleet.unified, SLOW_S)
    for _ in range(UNIFIED_RUNNING):
        await client.generate(fleet.unified, client.prompt(9), 60, priority=5).begun.wait()
    later = client.generate(fleet.unified, client.prompt(9), 40, priority=1)
    await client.until(fleet.unified, lambda load: load["queues"]["waiting"] == 1)
    sooner = client.generate(fleet.unified, client.prompt(9), 40, priority=3)
    await sooner.begun.wait()
    first = not later.chunks
    await client.slow(fleet.unified, None)
    await asyncio.gather(later.task, sooner.task)
    assert first
    assert {later.finish["type"], sooner.finish["type"]} == {"length"}


async def test_an_urgent_request_displaces_a_running_one_of_a_unified_server_at_no_token(
    client: Client, fleet: FleetUnderTest
) -> None:
    await client.slow(fleet.unified, SLOW_S)
    holders = []
    for _ in range(UNIFIED_RUNNING):
        holders.append(client.generate(fleet.unified, client.prompt(9), 100, priority=1))
        await holders[-1].begun.wait()
    urgent = client.generate(fleet.unified, client.prompt(9), 5, priority=100)
    await urgent.task
    await client.slow(fleet.unified, None)
    await asyncio.gather(*(leg.task for leg in holders))
    assert urgent.finish == {"type": "length", "length": 5}
    assert [len(leg.ids) for leg in holders] == [100] * UNIFIED_RUNNING
    assert sum(leg.meta["num_retractions"] for leg in holders) == 1


async def test_a_much_more_urgent_request_waits_for_a_slot_on_a_decode_server(
    client: Client, fleet: FleetUnderTest
) -> None:
    await client.slow(fleet.relaxed, SLOW_S)
    holders = [
        client.pair(client.prompt(9), 60, decode=fleet.relaxed, priority=1)[1]
        for _ in range(RELAXED_RUNNING)
    ]
    await client.until(fleet.relaxed, lambda load: load["num_running_reqs"] == RELAXED_RUNNING)
    _, urgent = client.pair(client.prompt(9), 5, decode=fleet.relaxed, priority=100)
    await urgent.task
    await client.slow(fleet.relaxed, None)
    await asyncio.gather(*(leg.task for leg in holders))
    assert any(leg.task.done() for leg in holders)
    assert {leg.meta["num_retractions"] for leg in holders} == {0}
