"""A simulation and an event loop take the same decisions, to the microsecond and the byte."""

from __future__ import annotations

import asyncio

import pytest

from policies.clock import Clock, VirtualClock
from policies.events import Decision, Dispatch, Reject
from tests.simulated_fleet import Fleet, left_over, traffic
from tests.virtual_loop import VirtualTimeLoop

JOBS, FEW_JOBS = 200, 40
SEEDS = range(100)
LONG_DAYS = 15


def prepared(clock: Clock, seed: int, count: int = JOBS) -> Fleet:
    """A random day, in which a decode server dies and comes back and some clients leave."""
    fleet = Fleet(clock, seed=seed)
    for job, answer_tokens in traffic(seed, count):
        fleet.ask(job, answer_tokens)
    decode = fleet.backend.engines["decode1"]
    fleet.at(0.5 + seed / 100, decode.kill)
    fleet.at(2.5, decode.revive)
    fleet.at(0.0, fleet.poll)
    return fleet


def simulated(seed: int, count: int = JOBS) -> Fleet:
    clock = VirtualClock()
    fleet = prepared(clock, seed, count)
    clock.run()
    return fleet


async def on_a_loop(seed: int, count: int = JOBS) -> Fleet:
    fleet = prepared(asyncio.get_running_loop(), seed, count)
    await fleet.over.wait()
    return fleet


@pytest.mark.parametrize("tens", range(10))
def test_the_simulator_and_the_loop_take_the_same_decisions(tens: int) -> None:
    for seed in SEEDS[tens::10]:
        count = JOBS if seed < LONG_DAYS else FEW_JOBS
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            live = runner.run(on_a_loop(seed, count))
        assert simulated(seed, count).trace == live.trace, seed


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_bytes(seed: int) -> None:
    first, second = (repr(simulated(seed).trace).encode() for _ in range(2))
    assert first == second


def test_another_seed_gives_other_decisions() -> None:
    assert simulated(0).trace != simulated(1).trace


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_nothing_is_left_when_the_day_is_over(seed: int) -> None:
    assert left_over(simulated(seed)) == {}


def test_the_day_has_what_makes_it_hard() -> None:
    """Retries, resumes, waits and both kinds of servers occur, or the comparison shows little."""
    decisions: list[Decision] = [it for seed in range(3) for _, it in simulated(seed).trace]
    dispatches = [it for it in decisions if isinstance(it, Dispatch)]
    assert {"retry", "resume"} <= {it.reason.value for it in dispatches}
    assert {it.prefill is None for it in dispatches} == {True, False}
    assert not any(isinstance(it, Reject) and it.reason == "no_worker" for it in decisions)
