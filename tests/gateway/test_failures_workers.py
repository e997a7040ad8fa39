"""Servers that come, go, restart and change their role while requests are running."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backends.addresses import canonical
from policies.types import Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    PAIR,
    QUICK,
    TWO_PAIRS,
    UNIFIED,
    Site,
    chat,
    entry_of,
    generate,
    spec,
    standing,
)

BACK_WITHIN_S = 5.0
"""From the moment a server listens again until requests go there: a probe and a cool-down."""


def page_of(site: Site, name: str) -> dict[str, object]:
    server = site.fleet[name]
    entry = entry_of(server)
    return {
        "url": server.url,
        "name": name,
        "worker_type": entry.role.value,
        "bootstrap_port": server.bootstrap_port,
    }


@pytest.mark.parametrize("headers", [{}, OFFLINE], ids=["online", "offline"])
async def test_without_any_server_all_are_told_at_once(headers: dict[str, str]) -> None:
    async with standing(workers=()) as site:
        told = await site.ask("/v1/chat/completions", chat(), headers)
        assert (told.status, told.code, told.took_s) == (503, "no_worker", 0.0)
        assert (await site.get("/readiness")).status == 503
        assert (await site.get("/liveness")).status == 200


async def test_a_prefill_server_alone_serves_nobody() -> None:
    async with standing(workers=["p1"]) as site:
        assert (await site.ask("/generate", generate())).code == "no_worker"


async def test_a_server_added_at_run_time_is_used_within_a_second() -> None:
    async with standing((*UNIFIED,), workers=()) as site:
        added = await site.ask("/workers", page_of(site, "u1"))
        assert added.status == 202
        await site.serves(within_s=1.0)


async def test_a_second_announcement_of_a_server_breaks_no_stream() -> None:
    async with standing() as site:
        asking = site.ask("/v1/chat/completions", chat(100, stream=True))
        async with site.meanwhile(asking) as answer:
            await site.until("it streams", lambda: site.core.ledgers["d1"].decodes)
            for name in ("p1", "d1"):
                await site.ask("/workers", page_of(site, name))
                assert (await site.ask("/generate", generate(2))).status == 200
            assert "error" not in str((await answer).events)


@pytest.mark.parametrize("how", ["removed", "drained"])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_streams_of_a_server_that_is_taken_away_end_normally(how: str, path: str) -> None:
    body = generate(100, stream=True) if path == "/generate" else chat(100, stream=True)
    async with standing((*TWO_PAIRS,)) as site:
        async with site.meanwhile(site.ask(path, body)) as answer:
            await site.until("it streams", lambda: site.core.ledgers["d1"].decodes)
            if how == "removed":
                gone = await site.ask("/workers/d1", b"", method="DELETE")
            else:
                gone = await site.ask("/workers/d1/drain", b"")
            assert gone.status == 202
            assert (await site.ask("/generate", generate(3))).status == 200
            assert (await answer).events[-1] == "[DONE]"
        assert len(site.sent_to("d1")) == 1
        assert len(site.sent_to("d2")) == 1


async def test_queued_work_is_told_when_its_last_server_goes() -> None:
    one = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, max_running=1))
    async with standing(one) as site:
        async with site.meanwhile(site.ask("/generate", generate(200))) as running:
            await site.until("it runs", lambda: len(site.sent) == 2)
            async with site.meanwhile(site.ask("/generate", generate(), OFFLINE)) as waiting:
                await site.until("another waits", lambda: len(site.gateway.front) == 2)
                await site.ask("/workers/d1", b"", method="DELETE")
                assert (await waiting).code == "no_worker"
            assert (await running).status == 200


@pytest.mark.parametrize("name", ["p1", "d1"])
async def test_a_server_that_was_killed_and_restarted_is_used_again_soon(name: str) -> None:
    async with standing() as site:
        await site.serves()
        await site.fleet.kill(name)
        broken = await site.ask("/generate", generate())
        assert broken.code in ("upstream_failed", "workers_unavailable")
        await site.until("its probes fail", lambda: not site.core.ledgers[name].up)
        assert (await site.ask("/generate", generate())).code == "workers_unavailable"
        await site.fleet.restart(name)
        await site.serves(within_s=BACK_WITHIN_S)


async def switch(site: Site, name: str, role: Role) -> None:
    body = {"new_role": role.value}
    async with site.http.post(site.fleet[name].url + "/pd_role_switch", json=body) as done:
        assert done.status == 200


async def test_a_prefill_server_that_is_back_before_decode_servers_miss_it_loses_no_request() -> (
    None
):
    """The gateway has missed it: the decode server is sent to another spelling of its address."""
    async with standing() as site:
        await site.serves()
        await site.fleet.kill("p1")
        await site.until("its probes fail", lambda: not site.core.ledgers["p1"].up)
        await site.fleet.restart("p1")
        await site.until("it is seen", lambda: site.core.ledgers["p1"].up)
        told = await site.ask("/generate", generate())
        assert (told.status, site.lines[-1]["attempts"]) == (200, 1)
        hosts = [sent.body["bootstrap_host"] for sent in site.sent_to("d1")]
        assert hosts[0] == canonical(hosts[-1]) == "127.0.0.1" != hosts[-1]


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_a_pair_lost_to_a_switch_that_nobody_saw_is_tried_again_and_then_works(
    path: str,
) -> None:
    """There and back between two probes; the retry finds the server at once."""
    body = generate() if path == "/generate" else chat()
    slow = replace(QUICK.telemetry, poll_ms=8_000.0)
    async with standing(telemetry=slow) as site:
        await site.serves()
        await switch(site, "p1", Role.DECODE)
        await switch(site, "p1", Role.PREFILL)
        first = await site.ask(path, body)
        second = await site.ask(path, body)
        patience_s = QUICK.timeouts.first_token_online_s
        assert (first.status, site.lines[-2]["attempts"]) == (200, 2)
        assert first.took_s < patience_s + 1.0
        assert (second.status, site.lines[-1]["attempts"]) == (200, 1)


async def test_a_fleet_that_was_down_at_the_start_is_used_when_it_comes() -> None:
    async with standing(workers=()) as site:
        for name in ("p1", "d1"):
            await site.fleet.kill(name)
            assert (await site.ask("/workers", page_of(site, name))).status == 202
        assert (await site.ask("/generate", generate())).status == 503
        for name in ("p1", "d1"):
            await site.fleet.restart(name)
        await site.serves(within_s=BACK_WITHIN_S)


async def test_a_role_that_is_switched_under_the_gateway_is_followed() -> None:
    fleet = (*PAIR, spec("x", Role.DECODE))
    async with standing(fleet) as site:
        await site.serves()
        await switch(site, "x", Role.PREFILL)
        await site.until(
            "the gateway knows", lambda: site.core.ledgers["x"].worker.role is Role.PREFILL, 2.0
        )
        await site.fleet.kill("p1")
        await site.serves(within_s=3.0)
        assert "x" in {sent.worker for sent in site.sent[-2:]}


async def test_a_switched_server_is_called_by_its_new_role_in_the_list() -> None:
    async with standing((*PAIR, spec("x", Role.PREFILL))) as site:
        await switch(site, "x", Role.DECODE)
        await site.until("a report", lambda: site.core.ledgers["x"].worker.role is Role.DECODE)
        told = await site.get("/workers")
        roles = {worker["id"]: worker["role"] for worker in told.body["workers"]}
        assert roles == {"p1": "prefill", "d1": "decode", "x": "decode"}
