"""More than the servers can take: some are told so at once, and afterwards all is as before."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.config import Admission, Limits
from policies.types import Role
from tests.gateway.gateway_under_test import (
    OFFLINE,
    QUICK,
    Site,
    Told,
    chat,
    generate,
    spec,
    standing,
)

ONE_AT_A_TIME = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, max_running=1))


async def crowd(site: Site, count: int, headers: dict[str, str] | None = None) -> list[Told]:
    asked = [site.ask("/v1/chat/completions", chat(60), headers) for _ in range(count)]
    return list(await asyncio.gather(*asked))


@pytest.mark.parametrize("headers", [{}, OFFLINE], ids=["online", "offline"])
async def test_a_full_queue_answers_429_and_the_rest_are_served(headers: dict[str, str]) -> None:
    async with standing(ONE_AT_A_TIME, limits=Limits(max_queued=3)) as site:
        told = await crowd(site, 10, headers)
        refused = [one for one in told if one.status != 200]
        assert {(one.status, one.code) for one in refused} == {(429, "queue_full")}
        assert all(int(one.headers["Retry-After"]) >= 1 for one in refused)
        assert len(told) - len(refused) == 4
        assert all(one.took_s == 0.0 for one in refused)
        assert (await site.serves()).took_s < 0.1


async def test_work_that_cannot_be_served_in_time_is_told_when_its_time_is_over() -> None:
    async with standing(ONE_AT_A_TIME) as site:
        running = site.ask("/generate", generate(600))
        async with site.meanwhile(running) as first:
            await site.until("it runs", lambda: len(site.sent) == 2)
            told = await site.ask("/v1/chat/completions", chat(), {"x-slo-ttft-ms": "200"})
            assert (told.status, told.code) == (503, "deadline_passed")
            assert told.took_s == pytest.approx(1.0, abs=0.01)
            assert int(told.headers["Retry-After"]) >= 1
            assert (await first).status == 200
        assert len(site.sent) == 2


async def test_a_hopeless_deadline_is_told_at_once_with_a_time_to_come_back() -> None:
    """The gateway has seen how fast prompts are computed, and how many wait."""
    async with standing(admission=Admission(prefill_chunks=1)) as site:
        long = "x" * 160_000
        assert (await site.ask("/generate", generate(1, text=long))).status == 200
        asked = [site.ask("/generate", generate(1, text=f"{n}{long}")) for n in range(16)]
        told = await asyncio.gather(*asked)
        hopeless = [one for one in told if one.status != 200]
        assert {(one.status, one.code) for one in hopeless} == {(503, "deadline_hopeless")}
        assert all(one.took_s < 0.1 for one in hopeless)
        assert all(int(one.headers["Retry-After"]) >= 1 for one in hopeless)
        assert max(one.took_s for one in told) < 15.0


async def test_after_an_overload_the_next_request_is_served_at_once() -> None:
    online = replace(QUICK.classes, online=replace(QUICK.classes.online, ttft_ms=300.0))
    async with standing(ONE_AT_A_TIME, classes=online) as site:
        told = await crowd(site, 40)
        codes = {one.code for one in told if one.status != 200}
        assert codes <= {"deadline_passed", "deadline_hopeless"}
        assert codes
        assert (await site.serves()).took_s < 0.1


async def test_offline_work_waits_behind_online_work_and_is_all_served() -> None:
    async with standing(ONE_AT_A_TIME) as site:
        offline, online = await asyncio.gather(crowd(site, 6, OFFLINE), crowd(site, 6))
        assert {one.status for one in online + offline} == {200}
        assert max(one.took_s for one in online) < max(one.took_s for one in offline)


async def test_a_prompt_that_fits_nowhere_is_refused_at_once() -> None:
    small = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, kv_tokens=1000))
    async with standing(small) as site:
        told = await site.ask("/v1/completions", {"prompt": [7] * 2000})
        assert (told.status, told.code) == (400, "context_length_exceeded")
        assert site.sent == []
