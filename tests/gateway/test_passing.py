"""What servers answer by themselves: whom the gateway asks, and how often."""

from __future__ import annotations

from typing import Any

import pytest

from backends.emulator import FaultKind
from gateway.config import Key, Server
from policies.types import Role
from tests.gateway.gateway_under_test import PAIR, UNIFIED, Site, generate, spec, standing

ALL = (*PAIR, *UNIFIED)
TWO_UNIFIED = (*UNIFIED, spec("u2", Role.UNIFIED))


def handled(site: Site, path: str) -> dict[str, int]:
    """How often each server was asked for this page."""
    return {name: site.calls.count((name, path)) for name in site.fleet.servers}


async def test_embeddings_come_from_a_unified_server() -> None:
    async with standing(ALL) as site:
        told = await site.ask("/v1/embeddings", {"input": ["a", "b"], "model": "emulated"})
        assert [entry["index"] for entry in told.body["data"]] == [0, 1]


async def test_embeddings_where_no_server_is_unified_are_refused_for_good() -> None:
    async with standing() as site:
        told = await site.ask("/v1/embeddings", {"input": "a"})
        assert (told.status, told.code) == (404, "needs_unified_server")
        assert "unified server" in told.body["error"]["message"]
        assert "retry-after" not in told.headers


async def test_embeddings_whose_server_is_down_may_be_asked_for_again() -> None:
    async with standing(ALL) as site:
        await site.fleet.kill("u1")
        await site.until("it is out", lambda: not site.core.ledgers["u1"].up)
        told = await site.ask("/v1/embeddings", {"input": "a"})
        assert (told.status, told.code) == (503, "workers_unavailable")
        assert told.headers["retry-after"] == "1"


async def test_work_that_hangs_is_not_given_to_the_next_server_too() -> None:
    async with standing(TWO_UNIFIED) as site:
        for name in site.fleet.servers:
            site.hurt(name, FaultKind.HANG, path="/v1/embeddings")
        told = await site.ask("/v1/embeddings", {"input": "a"})
        assert (told.status, told.code) == (504, "upstream_timeout")
        assert sorted(handled(site, "/v1/embeddings").values()) == [0, 1]


async def test_work_whose_server_dies_under_it_is_not_repeated() -> None:
    async with standing(TWO_UNIFIED) as site:
        site.hurt("u1", FaultKind.REFUSE, path="/v1/tokenize")
        told = await site.ask("/v1/tokenize", {"prompt": "a"})
        assert (told.status, told.code) == (502, "upstream_failed")
        assert handled(site, "/v1/tokenize")["u2"] == 0


async def test_work_that_could_not_be_sent_goes_to_the_next_server() -> None:
    async with standing(TWO_UNIFIED) as site:
        await site.fleet.kill("u1")
        assert (await site.ask("/v1/tokenize", {"prompt": "a"})).status == 200


async def test_a_question_that_one_server_does_not_answer_goes_to_the_next() -> None:
    async with standing(TWO_UNIFIED) as site:
        site.hurt("u1", FaultKind.REFUSE, path="/model_info")
        assert (await site.get("/model_info")).status == 200


async def test_work_goes_to_a_server_of_its_model() -> None:
    async with standing((*UNIFIED, spec("u2", Role.UNIFIED, model="another"))) as site:
        for _ in range(3):
            await site.ask("/v1/tokenize", {"prompt": "a", "model": "another"})
        assert handled(site, "/v1/tokenize") == {"u1": 0, "u2": 3}
        told = await site.ask("/v1/tokenize", {"prompt": "a", "model": "gpt-17"})
        assert (told.status, told.code) == (404, "unknown_model")


@pytest.mark.parametrize("body", [b"no json", b"[]", b'{"model": 7, "prompt": "a"}'])
async def test_a_body_that_names_no_model_is_its_servers_to_judge(body: bytes) -> None:
    async with standing(UNIFIED) as site:
        await site.ask("/v1/tokenize", body)
        assert handled(site, "/v1/tokenize") == {"u1": 1}


async def test_an_answer_that_is_passed_on_carries_the_callers_id() -> None:
    async with standing(UNIFIED) as site:
        told = await site.ask("/tokenize", {"prompt": "a"}, {"x-request-id": "abc"})
        assert told.headers["x-request-id"] == "abc"


async def test_one_model_is_described_and_an_unknown_one_is_not_found() -> None:
    async with standing((*UNIFIED, spec("u2", Role.UNIFIED, model="org/another"))) as site:
        assert (await site.get("/v1/models/org/another")).body["id"] == "org/another"
        assert (await site.get("/v1/models/org%2Fanother")).body["id"] == "org/another"
        told = await site.get("/v1/models/gpt-17")
        assert (told.status, told.code) == (404, "unknown_model")


@pytest.mark.parametrize("fleet", [PAIR, UNIFIED], ids=["pair", "unified"])
async def test_a_fleet_that_gives_a_token_generates(fleet: Any) -> None:
    async with standing(fleet) as site:
        told = await site.get("/health_generate")
        assert (told.status, told.raw) == (200, b"OK")


async def test_a_fleet_that_gives_no_token_does_not_generate() -> None:
    async with standing() as site:
        site.hurt("d1", FaultKind.ERROR_STATUS, status=500)
        told = await site.get("/health_generate")
        assert told.status == 503
        assert b"d1: 500" in told.raw
    async with standing(workers=["p1"]) as site:
        assert (await site.get("/health_generate")).raw == b"no server is available"


async def test_many_who_ask_for_a_token_share_a_few_trials() -> None:
    async with standing(UNIFIED, key=(Key(key="k", tenant="t"),)) as site:
        async with site.meanwhile(site.get("/health_generate")) as first:
            waiting = [site.get("/health_generate") for _ in range(5)]
            told = [(await one).status for one in waiting]
            assert [*told, (await first).status] == [200] * 6
        assert handled(site, "/generate")["u1"] <= 6


async def test_a_flush_reaches_every_server() -> None:
    async with standing(ALL) as site:
        assert (await site.ask("/flush_cache", b"")).status == 200
        assert handled(site, "/flush_cache") == {"p1": 1, "d1": 1, "u1": 1}


async def test_a_flush_that_a_busy_server_refuses_names_it() -> None:
    async with standing(TWO_UNIFIED) as site:
        async with site.meanwhile(site.ask("/generate", generate(200))):
            await site.until("it runs", lambda: len(site.sent))
            told = await site.get("/flush_cache")
        assert (told.status, told.code) == (400, "upstream_rejected")
        message = told.body["error"]["message"]
        assert message == f"1 of 2 servers flushed; {site.sent[0].worker}: Flush cache failed."


async def test_only_an_admin_flushes() -> None:
    server = Server(port=0, admin_key="admin")
    async with standing(UNIFIED, server=server) as site:
        assert (await site.ask("/flush_cache", b"")).status == 401
        assert (await site.ask("/flush_cache", b"", {"x-api-key": "admin"})).status == 200
