"""A server changes its role while it runs, when it is idle."""

from __future__ import annotations

from typing import Any

from tests.conformance.under_test import Client, FleetUnderTest, is_idle

TO_PREFILL = {"new_role": "prefill"}
TO_DECODE = {"new_role": "decode", "decode_cuda_graph_memory_gb": 0}


async def switch(client: Client, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    await client.idle(url)
    return await client.post(url + "/pd_role_switch", body)


async def test_a_decode_server_becomes_a_prefill_server_and_comes_back(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(300)
    there = await switch(client, fleet.relaxed, TO_PREFILL)
    mode = (await client.loads(fleet.relaxed))["disaggregation"]["mode"]
    _, model = await client.get(fleet.relaxed + "/model_info")
    prefill, decode = await client.paired(prompt, 8, prefill=fleet.relaxed)
    back = await switch(client, fleet.relaxed, TO_DECODE)
    _, again = await client.paired(prompt, 8, decode=fleet.relaxed)
    alone = await client.generated(fleet.unified, prompt, 8)
    assert (there[0], back[0]) == (200, 200)
    assert (there[1]["old_role"], there[1]["new_role"]) == ("decode", "prefill")
    assert mode == model["disaggregation_mode"] == "prefill"
    assert prefill.finish == {"type": "length", "length": 0}
    assert decode.ids == again.ids == alone.ids


async def test_a_prefill_server_becomes_a_decode_server(
    client: Client, fleet: FleetUnderTest
) -> None:
    prompt = client.prompt(300)
    alone = await client.generated(fleet.unified, prompt, 8)
    answers = [
        await switch(client, fleet.relaxed, TO_PREFILL),
        await switch(client, fleet.prefill, TO_DECODE),
    ]
    _, decode = await client.paired(prompt, 8, prefill=fleet.relaxed, decode=fleet.prefill)
    answers.append(await switch(client, fleet.prefill, TO_PREFILL))
    answers.append(await switch(client, fleet.relaxed, TO_DECODE))
    assert [status for status, _ in answers] == [200] * 4
    assert decode.ids == alone.ids


async def test_a_prefill_server_that_came_back_is_cold_and_works_at_the_second_try(
    client: Client, fleet: FleetUnderTest
) -> None:
    """A decode server that knew it before holds a stale connection, and loses one request."""
    prompt = client.prompt(300)
    for _ in range(2):  # the first may be lost to a switch of an earlier test
        _, met = await client.paired(prompt, 2)
    await switch(client, fleet.prefill, TO_DECODE)
    await switch(client, fleet.prefill, TO_PREFILL)
    lost = await client.paired(prompt, 2)
    prefill, decode = await client.paired(prompt, 2)
    assert met.finish == {"type": "length", "length": 2}
    assert [leg.finish.get("status_code") for leg in lost] == [500, 500]
    assert "timed out" in lost[1].finish["message"]
    assert decode.finish == {"type": "length", "length": 2}
    assert prefill.meta["cached_tokens"] == 0


async def switched_and_back(client: Client, fleet: FleetUnderTest) -> None:
    """Both servers know each other, and the connection between them leads nowhere."""
    for _ in range(2):
        _, met = await client.paired(client.prompt(9), 2)
    assert met.finish["type"] == "length"
    for body in (TO_DECODE, TO_PREFILL):
        await switch(client, fleet.prefill, body)


async def test_all_pairs_are_lost_until_one_has_waited_whoever_closes_them(
    client: Client, fleet: FleetUnderTest
) -> None:
    await switched_and_back(client, fleet)
    closed = client.pair(client.prompt(9), 2)
    await client.until(fleet.decode, lambda load: not is_idle(load))
    for leg in closed:
        leg.task.cancel()
    some, others = client.pair(client.prompt(9), 2), client.pair(client.prompt(9), 2)
    for leg in (*some, *others):
        await leg.task
    _, decode = await client.paired(client.prompt(9), 2)
    assert [leg.finish.get("status_code") for leg in (*some, *others)] == [500] * 4
    assert decode.finish == {"type": "length", "length": 2}


async def test_another_spelling_of_an_address_is_a_connection_of_its_own(
    client: Client, fleet: FleetUnderTest
) -> None:
    """By this the gateway loses no pair to a server that has come back."""
    await switched_and_back(client, fleet)
    spellings = ("127.0.0.0x1", "LocalHost", "127.0.0.0x01")
    anew = [
        await client.paired(client.prompt(9), 2, bootstrap_host=spelling) for spelling in spellings
    ]
    _, lost = await client.paired(client.prompt(9), 2)
    assert [decode.finish for _, decode in anew] == [{"type": "length", "length": 2}] * 3
    assert "timed out" in lost.finish["message"]


async def test_a_busy_server_refuses_to_switch(client: Client, fleet: FleetUnderTest) -> None:
    _, decode = client.pair(client.prompt(30), 400)
    await client.until(fleet.decode, lambda load: load["num_running_reqs"] == 1)
    status, told = await client.post(fleet.decode + "/pd_role_switch", TO_PREFILL)
    await decode.task
    assert (status, told["success"]) == (400, False)
    assert "instance is not idle" in told["message"]
    assert decode.finish["type"] == "length"


async def test_a_unified_server_refuses_to_switch(client: Client, fleet: FleetUnderTest) -> None:
    status, told = await client.post(fleet.unified + "/pd_role_switch", TO_PREFILL)
    assert (status, told["success"]) == (400, False)
