from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from backends.emulator import FaultKind
from gateway.config import Cost, Telemetry
from policies.steps import Steps
from policies.types import Role
from tests.gateway.gateway_under_test import Site, generate, spec, standing

COST = Cost(model="Llama-3.1-8B", device="h100")
PAIR = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE))
SLOW_PAIR = (spec("p1", Role.PREFILL), spec("d1", Role.DECODE, speed=0.2))
"""Decode steps of about 35 ms, so that a report every 200 ms holds five or six of them."""
OFTEN = Telemetry(poll_ms=200, timeout_ms=1000)


@asynccontextmanager
async def busy(site: Site, streams: int = 8, tokens: int = 40) -> AsyncIterator[None]:
    """So many requests at any time, each with a prompt that no cache knows."""

    async def stream(number: int) -> None:
        turn = 0
        while True:
            turn += 1
            text = " ".join(f"{number}-{turn}-{word}" for word in range(300))
            await site.ask("/generate", generate(tokens, text=text))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream(number)) for number in range(streams)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


def steps_of(site: Site, name: str) -> Steps:
    steps = site.core.ledgers[name].steps
    assert steps is not None
    return steps


async def settle(site: Site, seconds: float) -> None:
    await asyncio.sleep(seconds)


async def test_what_is_predicted_as_it_is_needs_little_correction() -> None:
    async with standing(PAIR, cost=COST) as site, busy(site):
        await settle(site, 10.0)
        decode, prefill = steps_of(site, "d1").decode, steps_of(site, "p1").prefill
    assert decode.factor == pytest.approx(1.0, abs=0.15)
    assert prefill.steps > 10
    assert decode.error < 0.05


@pytest.mark.parametrize("phase_s", [0.0, 0.06, 0.13])
async def test_a_slower_decode_server_is_learnt_within_20_of_its_steps_and_unlearnt_again(
    phase_s: float,
) -> None:
    async with standing(SLOW_PAIR, cost=COST, telemetry=OFTEN) as site, busy(site, tokens=400):
        await settle(site, 10.0 + phase_s)
        normal = steps_of(site, "d1").decode.factor
        before = site.fleet["d1"].engine.machine.counters.decode_moments[0]
        site.hurt("d1", FaultKind.SLOW, factor=2.0)
        await site.until(
            "slowness is learnt",
            lambda: steps_of(site, "d1").decode.factor > normal * 1.8,
        )
        learnt = site.fleet["d1"].engine.machine.counters.decode_moments[0] - before
        site.heal("d1")
        before += learnt
        await site.until(
            "slowness is unlearnt", lambda: steps_of(site, "d1").decode.factor < normal * 1.15
        )
        unlearnt = site.fleet["d1"].engine.machine.counters.decode_moments[0] - before
    assert learnt <= 20
    assert unlearnt <= 20


async def test_a_slow_down_at_the_usual_speed_is_learnt_and_unlearnt_within_three_reports() -> None:
    async with standing(PAIR, cost=COST) as site, busy(site, tokens=400):
        await settle(site, 10.0)
        steps = steps_of(site, "d1")
        normal = steps.decode.factor
        step_s = site.fleet["d1"].engine.times.decode_s(8, 8 * 500)
        await slow_down(site, step_s)
        await settle(site, 1.6)
        slowed = steps.decode.factor
        await slow_down(site, 0.0)
        await settle(site, 1.6)
    assert slowed == pytest.approx(2 * normal, rel=0.1)
    assert steps.decode.factor == pytest.approx(normal, rel=0.1)


async def slow_down(site: Site, seconds: float) -> None:
    url = site.fleet["d1"].url + "/slow_down"
    async with site.http.post(url, json={"forward_sleep_time": seconds or None}) as response:
        assert response.status == 200


async def test_a_slower_prefill_server_is_learnt_and_unlearnt() -> None:
    async with standing(PAIR, cost=COST) as site, busy(site, streams=4, tokens=4):
        await settle(site, 3.0)
        normal = steps_of(site, "p1").prefill.factor
        site.hurt("p1", FaultKind.SLOW, factor=2.0)
        await settle(site, 1.6)
        slowed = steps_of(site, "p1").prefill.factor
        site.heal("p1")
        await settle(site, 1.6)
        again = steps_of(site, "p1").prefill.factor
    assert slowed == pytest.approx(2 * normal, rel=0.15)
    assert again == pytest.approx(normal, rel=0.15)


async def test_one_strange_report_changes_nothing() -> None:
    async with standing(PAIR, cost=COST) as site, busy(site, tokens=400):
        await settle(site, 10.0)
        steps = steps_of(site, "d1")
        normal = steps.decode.factor
        site.fleet["d1"].engine.machine.counters.decode_moments[2] += 3e6
        await settle(site, 0.55)
        assert steps.decode.factor == pytest.approx(normal, rel=0.05)
        await settle(site, 1.0)
    assert steps.decode.factor == pytest.approx(normal, rel=0.05)


async def test_the_faster_of_two_servers_gets_more_once_the_slower_one_is_known() -> None:
    fleet = (*PAIR, spec("d2", Role.DECODE, speed=0.25))
    async with standing(fleet, cost=COST) as site:
        async with busy(site, streams=16, tokens=100):
            await settle(site, 8.0)
            fast, slow = (site.core.ledgers[name].decodes for name in ("d1", "d2"))
    assert fast > 2 * slow


async def test_corrections_are_gauges_and_on_the_workers_page() -> None:
    async with standing(PAIR, cost=COST) as site, busy(site):
        await settle(site, 5.0)
        metrics = (await site.get("/metrics")).raw.decode()
        workers = (await site.get("/workers")).body["workers"]
    for name in ("correction", "correction_error", "correction_age_seconds"):
        assert f'slackwater_worker_{name}{{phase="decode",worker="d1"}}' in metrics
    page = next(one for one in workers if one["id"] == "d1")["predicted"]
    assert page["decode"]["steps"] > 0
    assert page["decode"]["age_ms"] <= 1000


async def test_without_hardware_nothing_is_predicted_and_the_start_says_so() -> None:
    async with standing(PAIR) as site, busy(site, streams=2):
        await settle(site, 2.0)
        metrics = (await site.get("/metrics")).raw.decode()
        page: dict[str, Any] = (await site.get("/workers")).body["workers"][0]
    assert page["predicted"] is None
    assert "slackwater_worker_correction{" not in metrics


async def test_a_restarted_server_is_no_fast_server() -> None:
    async with standing(PAIR, cost=COST, telemetry=Telemetry(poll_ms=200)) as site:
        async with busy(site, streams=4):
            await settle(site, 5.0)
        normal = steps_of(site, "d1").decode
        counters = site.fleet["d1"].engine.machine.counters
        counters.decode_moments[:] = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        await settle(site, 1.0)
        assert steps_of(site, "d1").decode.factor == normal.factor
        assert json.loads((await site.get("/workers")).raw)["total"] == 2
