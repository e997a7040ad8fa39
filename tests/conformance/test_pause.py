"""A paused server holds its work and goes on where it was."""

from __future__ import annotations

import asyncio

from tests.conformance.under_test import Client, FleetUnderTest


async def test_a_paused_server_generates_nothing_and_is_not_ready(
    client: Client, fleet: FleetUnderTest
) -> None:
    leg = client.generate(fleet.unified, client.prompt(20), 400)
    await leg.begun.wait()
    paused, _ = await client.post(fleet.unified + "/pause_generation", {"mode": "in_place"})
    await asyncio.sleep(0.3)
    seen = len(leg.ids)
    await asyncio.sleep(0.5)
    ready, _ = await client.get(fleet.unified + "/ready")
    stood = len(leg.ids) == seen
    continued, _ = await client.post(fleet.unified + "/continue_generation", {})
    assert (paused, ready, continued, stood) == (200, 503, 200, True)


async def test_a_continued_request_ends_as_if_nothing_had_happened(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(20)
    leg = client.generate(fleet.unified, prompt, 150)
    await leg.begun.wait()
    await client.post(fleet.unified + "/pause_generation", {"mode": "in_place"})
    await asyncio.sleep(0.2)
    await client.post(fleet.unified + "/continue_generation", {})
    await leg.task
    again = await client.generated(fleet.unified, prompt, 150)
    assert leg.ids == again.ids


async def test_a_request_that_comes_during_a_pause_is_held(
    client: Client, fleet: FleetUnderTest
) -> None:
    await client.post(fleet.unified + "/pause_generation", {"mode": "in_place"})
    leg = client.generate(fleet.unified, client.prompt(9), 3)
    await asyncio.sleep(0.5)
    held = not leg.chunks
    await client.post(fleet.unified + "/continue_generation", {})
    await leg.task
    assert held
    assert leg.finish["type"] == "length"


async def test_a_pause_with_abort_ends_what_runs(client: Client, fleet: FleetUnderTest) -> None:
    leg = client.generate(fleet.unified, client.prompt(20), 3000)
    await leg.begun.wait()
    await client.post(fleet.unified + "/pause_generation", {"mode": "abort"})
    await leg.task
    await client.post(fleet.unified + "/continue_generation", {})
    assert leg.finish["type"] == "abort"


async def test_a_server_that_does_not_stand_still_may_be_told_to_go_on(
    client: Client, fleet: FleetUnderTest
) -> None:
    answers = [
        await client.post(url + "/continue_generation", {"torch_empty_cache": False})
        for url in (fleet.unified, fleet.prefill, fleet.decode)
    ]
    assert [status for status, _ in answers] == [200, 200, 200]
    assert len((await client.generated(fleet.unified, client.prompt(9), 3)).ids) == 3


async def test_what_is_aborted_during_a_pause_is_gone_once_the_server_goes_on(
    client: Client, fleet: FleetUnderTest
) -> None:
    rid = client.rid()
    leg = client.generate(fleet.unified, client.prompt(20), 3000, rid=rid)
    await leg.begun.wait()
    await client.post(fleet.unified + "/pause_generation", {"mode": "in_place"})
    await client.abort(fleet.unified, rid)
    await client.post(fleet.unified + "/continue_generation", {"torch_empty_cache": False})
    await leg.task
    assert leg.finish["type"] == "abort"
    await client.idle(fleet.unified)


async def test_a_pair_whose_decode_server_stands_still_goes_on_where_it_was(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(20)
    _, alone = await client.paired(prompt, 60)
    _, leg = client.pair(prompt, 60)
    await leg.begun.wait()
    await client.post(fleet.decode + "/pause_generation", {"mode": "in_place"})
    await asyncio.sleep(0.5)
    await client.post(fleet.decode + "/continue_generation", {"torch_empty_cache": False})
    await leg.task
    assert leg.ids == alone.ids
