"""When a failed attempt is tried again, and when servers are left alone."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from backends.emulator import FaultKind
from gateway.config import BreakerSettings, Retry, Telemetry
from tests.gateway.gateway_under_test import (
    OFFLINE,
    PAIR,
    TWO_PAIRS,
    Site,
    chat,
    generate,
    standing,
)

PATIENT = Telemetry(poll_ms=10_000.0)
"""Probes stay out of the way."""


async def open_the_breaker_of(site: Site, name: str) -> None:
    site.hurt(name, FaultKind.ERROR_STATUS, status=500, requests=3)
    told = await site.ask("/generate", generate())
    assert told.code == "upstream_failed"
    assert not site.core.ledgers[name].breaker.is_closed


async def test_online_attempts_follow_each_other_at_once() -> None:
    async with standing() as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500)
        told = await site.ask("/generate", generate())
        assert (told.code, told.took_s < 0.01) == ("upstream_failed", True)
        assert len(site.sent_to("p1")) == 3


async def test_offline_attempts_wait_twice_as_long_each_time() -> None:
    async with standing() as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500, requests=2)
        told = await site.ask("/generate", generate(), OFFLINE)
        assert told.status == 200
        times = [sent.at_s for sent in site.sent_to("p1")]
        assert [round(b - a, 2) for a, b in pairwise(times)] == [0.25, 0.5]


async def test_retries_stop_when_their_budget_of_prompt_tokens_is_spent() -> None:
    body = generate(text="x" * 400)
    async with standing(retry=Retry(burst_tokens=150, share=0.0)) as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500)
        assert (await site.ask("/generate", body)).code == "upstream_failed"
        assert len(site.sent_to("p1")) == 2
        assert site.core.retry_budget_tokens < 100


async def test_fresh_prompt_tokens_earn_retries() -> None:
    async with standing(retry=Retry(burst_tokens=150, share=1.0)) as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500, requests=1)
        assert (await site.ask("/generate", generate(text="x" * 400))).status == 200
        spent = site.core.retry_budget_tokens
        assert (await site.ask("/generate", generate(text="y" * 160))).status == 200
        assert site.core.retry_budget_tokens == spent + 40


async def test_nothing_is_tried_again_after_its_deadline() -> None:
    async with standing() as site:
        site.hurt("p1", FaultKind.HANG)
        told = await site.ask("/generate", generate(), {"x-slo-ttft-ms": "300"})
        assert told.code == "upstream_timeout"
        assert len(site.sent_to("p1")) == 1


async def test_three_failures_take_a_server_out_and_others_are_used() -> None:
    async with standing(TWO_PAIRS, telemetry=PATIENT) as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500)
        for _ in range(6):
            assert (await site.ask("/generate", generate())).status == 200
        assert len(site.sent_to("p1")) == 3
        assert len(site.sent_to("p2")) == 6


async def test_a_half_open_breaker_lets_one_request_try_and_closes_on_its_success() -> None:
    async with standing(telemetry=PATIENT) as site:
        await open_the_breaker_of(site, "p1")
        opened_s, before = site.now_s(), len(site.sent_to("p1"))
        asked = [site.ask("/generate", generate(), OFFLINE) for _ in range(4)]
        async with site.meanwhile(asyncio.wait_for(asyncio.gather(*asked), 20)) as answers:
            assert [told.status for told in await answers] == [200] * 4
        trial, *others = [sent.at_s for sent in site.sent_to("p1")[before:]]
        assert opened_s + 2.0 <= trial < min(others)
        assert site.core.ledgers["p1"].breaker.is_closed


async def test_a_trial_that_fails_doubles_the_pause() -> None:
    async with standing(
        telemetry=PATIENT, breaker=BreakerSettings(failures=1, cooldown_ms=1000.0)
    ) as site:
        site.hurt("p1", FaultKind.ERROR_STATUS, status=500, requests=3)
        told = await site.ask("/generate", generate(), OFFLINE)
        times = [sent.at_s for sent in site.sent_to("p1")]
        assert told.status == 200
        assert [round(b - a) for a, b in pairwise(times)] == [1, 2, 4]


async def test_no_decode_server_hears_of_a_request_whose_prefill_breaker_is_open() -> None:
    async with standing(telemetry=PATIENT) as site:
        await open_the_breaker_of(site, "p1")
        sent = len(site.sent)
        told = await site.ask("/v1/chat/completions", chat(stream=True))
        assert (told.status, told.code, told.took_s) == (503, "workers_unavailable", 0.0)
        assert told.headers["Retry-After"] in ("1", "2")
        assert len(site.sent) == sent


async def test_offline_work_waits_for_open_breakers_and_is_served_after_recovery() -> None:
    async with standing(telemetry=PATIENT) as site:
        await open_the_breaker_of(site, "p1")
        online = await site.ask("/generate", generate())
        offline = await site.ask("/generate", generate(), OFFLINE)
        assert online.code == "workers_unavailable"
        assert offline.status == 200
        assert 1.0 < offline.took_s < 3.0


async def test_our_own_aborts_never_count_against_a_server() -> None:
    async with standing(PAIR) as site:
        for _ in range(5):
            site.hurt("p1", FaultKind.HANG, requests=1)
            async with site.meanwhile(site.ask("/generate", generate(stream=True))):
                await site.until("it hangs", lambda: not len(site.fleet["p1"].faults))
        await site.serves()
        assert all(ledger.breaker.is_closed for ledger in site.core.ledgers.values())
