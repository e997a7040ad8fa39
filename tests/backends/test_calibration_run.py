from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from backends.calibration_run import (
    CannotMeasure,
    Facts,
    Findings,
    Measuring,
    Peer,
    Target,
    facts_of,
    is_even,
    outside_in,
    planned,
    planned_decodes,
    planned_prefills,
)
from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from backends.http import Upstream
from backends.steptimes import LinearStepTimes, Noisy
from policies.calibration import DecodeMoments
from policies.types import Role

FACTS = Facts(
    mode="null",
    model_path="m",
    accelerator="",
    tp=1,
    chunk_tokens=2048,
    context_tokens=16_000,
    kv_tokens=65_536,
    max_running=32,
    bootstrap_port=8998,
)
TRUE = LinearStepTimes()


def spec(role: Role, name: str = "", **more: Any) -> ServerSpec:
    settings = {"kv_tokens": 65_536, "max_running": 32, "chunk_tokens": 4096, **more}
    return ServerSpec(engine=EngineConfig(name=name or str(role), role=role, **settings))


@asynccontextmanager
async def standing(*specs: ServerSpec) -> AsyncIterator[tuple[EmulatedFleet, Target]]:
    async with EmulatedFleet(specs) as fleet:
        peers = [Peer(server.url, Upstream(server.url)) for server in fleet.servers.values()]
        try:
            yield fleet, Target(peers[0], peers[-1])
        finally:
            for peer in peers:
                peer.upstream.close()


async def measured(
    target: Target, *, budget_s: float = 1000.0, rounds: int = 1, vocabulary: int = 32_000
) -> Findings:
    facts = (await facts_of(target.prefill), await facts_of(target.decode))
    measuring = Measuring(
        target,
        facts,
        vocabulary,
        asyncio.get_running_loop(),
        random.Random(3),
        plan=planned(*facts),
        budget_s=budget_s,
        report=lambda share, what: None,
    )
    return await measuring.run(rounds)


def check(findings: Findings) -> None:
    """What the emulated server was measured at is what it was told to take."""
    samples = findings.samples()
    prefills = [s for s in samples if s.batch.phase.value == "prefill"]
    decodes = [s for s in samples if s.batch.phase.value == "decode"]
    assert len(prefills) == 8
    assert len(decodes) >= 10
    for sample in prefills:
        assert sample.seconds == pytest.approx(
            TRUE.prefill_s([(sample.batch.new_tokens, 0)]), rel=1e-3
        )
    for sample in decodes:
        true_s = TRUE.decode_s(sample.batch.count, sample.batch.context_tokens)
        assert sample.seconds == pytest.approx(true_s, rel=0.02)


async def test_a_unified_server_is_measured_at_its_true_step_times() -> None:
    async with standing(spec(Role.UNIFIED)) as (_, target):
        check(await measured(target))


async def test_a_pair_is_measured_at_its_true_step_times_and_nothing_is_left_on_it() -> None:
    async with standing(spec(Role.PREFILL), spec(Role.DECODE)) as (fleet, target):
        check(await measured(target))
        assert fleet.resident() == {}


async def test_prompts_behind_a_cached_prefix_are_kept_apart() -> None:
    async with standing(spec(Role.UNIFIED)) as (_, target):
        found = await measured(target)
    behind = found.behind_prefixes()
    assert [(s.batch.new_tokens, s.batch.context_tokens) for s in behind] == [
        (256, 1024), (512, 4096), (2048, 8192),
    ]  # fmt: skip
    assert behind[1].seconds == pytest.approx(TRUE.prefill_s([(512, 4096)]), rel=1e-3)


async def test_prompts_that_begin_alike_by_chance_are_cold_all_the_same() -> None:
    async with standing(spec(Role.UNIFIED)) as (_, target):
        found = await measured(target, rounds=2, vocabulary=24)
    assert {key for key in found.prefills if not key[1]} == {
        (n, 0) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096)
    }
    assert all(len(seconds) == 2 for seconds in found.prefills.values())


async def test_noise_of_single_steps_averages_out() -> None:
    noisy = replace(spec(Role.UNIFIED), times=Noisy(TRUE, random.Random(1), sigma=0.1))
    async with standing(noisy) as (_, target):
        found = await measured(target, rounds=3)
    decodes = [s for s in found.samples() if s.batch.phase.value == "decode"]
    errors = [
        abs(s.seconds / TRUE.decode_s(s.batch.count, s.batch.context_tokens) - 1) for s in decodes
    ]
    assert max(errors) < 0.05


async def test_time_that_runs_out_ends_the_measuring_with_both_phases_begun() -> None:
    async with standing(spec(Role.UNIFIED)) as (_, target):
        began_s = asyncio.get_running_loop().time()
        found = await measured(target, budget_s=5.0, rounds=3)
        took_s = asyncio.get_running_loop().time() - began_s
    assert took_s < 8.0
    assert found.prefills
    assert found.decodes


async def test_a_dead_server_is_told_in_one_line() -> None:
    async with standing(spec(Role.UNIFIED)) as (fleet, target):
        await fleet.kill("unified")
        with pytest.raises(CannotMeasure, match="does not answer") as told:
            await facts_of(target.prefill)
    assert "\n" not in str(told.value)


async def test_a_server_that_dies_meanwhile_is_told_too() -> None:
    async with standing(spec(Role.PREFILL), spec(Role.DECODE)) as (fleet, target):
        asyncio.get_running_loop().call_later(3.0, fleet["decode"].engine.kill)
        with pytest.raises(CannotMeasure):
            await measured(target)


async def test_a_busy_server_is_refused() -> None:
    async with standing(spec(Role.UNIFIED)) as (fleet, target):
        async with asyncio.TaskGroup() as group:
            group.create_task(_someone_else(target, 200))
            await asyncio.sleep(0.5)
            with pytest.raises(CannotMeasure, match="busy with 1 request"):
                await facts_of(target.prefill)
        assert fleet.resident() == {}


async def test_somebody_who_never_stops_is_noticed() -> None:
    async with standing(spec(Role.UNIFIED)) as (_, target):
        async with asyncio.TaskGroup() as group:
            facts = await facts_of(target.prefill)
            assert facts.max_running == 32
            other = group.create_task(_someone_else(target, 4000, after_s=2.0))
            with pytest.raises(CannotMeasure, match="somebody else uses it"):
                await measured(target)
            other.cancel()


async def _someone_else(target: Target, tokens: int, *, after_s: float = 0.0) -> None:
    await asyncio.sleep(after_s)
    body = (
        b'{"input_ids": [5, 6, 7], "sampling_params": {"ignore_eos": true, "max_new_tokens": %d}}'
    )
    done = asyncio.get_running_loop().create_future()

    class Listening:
        def on_head(self, status: int) -> None: ...
        def on_body(self, piece: bytes) -> None: ...
        def on_end(self) -> None:
            done.set_result(None)

        def on_error(self, error: Exception) -> None:
            done.set_result(None)

    call = target.decode.upstream.send(b"POST", b"/generate", body % tokens, Listening())
    try:
        await done
    finally:
        call.cancel()


def test_no_prompt_is_longer_than_a_chunk_and_no_batch_larger_than_the_server() -> None:
    assert max(new for new, _ in planned_prefills(FACTS)) == 2048
    small = replace(FACTS, max_running=4, kv_tokens=8192)
    assert {count for count, _ in planned_decodes(small)} == {1, 4}
    assert all(count * (context + 256) <= 0.7 * 8192 for count, context in planned_decodes(small))


def test_the_corners_of_the_plan_come_first() -> None:
    assert outside_in([1, 2, 3, 4, 5]) == [1, 5, 2, 4, 3]
    assert planned_prefills(FACTS)[:2] == [(32, 0), (2048, 0)]


def test_a_window_in_which_requests_joined_is_not_even() -> None:
    steady = DecodeMoments(
        steps=10, batch=80, time_us=1, batch_squared=640, batch_time_us=1, generated=80
    )
    assert is_even(steady)
    assert not is_even(replace(steady, batch=45, batch_squared=285))
