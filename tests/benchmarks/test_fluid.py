from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.workload import Ask
from benchmarks.fluid import Mix, Servers, Targets, bound
from gateway.config import Policies
from gateway.scenario import FleetEntry, PolicyEntry, Scenario, ServerEntry, WorkloadEntry
from gateway.simulation.asks import prepared
from gateway.simulation.fleet import servers_of
from gateway.simulation.plan import planned
from gateway.simulation.world import Case, World
from policies.types import Kind, Role


class Flat:
    """A tenth of a second for 1,000 prompt tokens; decode steps as long as the test says."""

    def __init__(self, step_s: float, each_s: float = 0.0) -> None:
        self._step_s, self._each_s = step_s, each_s

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return sum(new for new, _ in chunks) * 1e-4

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return self._step_s + self._each_s * batch


SERVERS = Servers(prefills=1, decodes=1, times=Flat(0.01), kv_tokens=100_000, max_running=4)
TARGETS = Targets(ttft_s=1.0, tpot_s=0.05)
SUMMARY = Ask(0.0, 1000, 11)
"""A tenth of a second of prefill, then ten steps."""


def of(servers: Servers, *online: Ask, until_s: float = 10.0, missing: int = 0) -> float:
    mix = Mix.of([SUMMARY], servers)
    found = bound(servers, online, mix, TARGETS, from_s=0.0, until_s=until_s, missing=missing)
    return found.requests_per_s if found.feasible else -1.0


def test_prefill_or_decode_servers_set_the_pace_by_themselves() -> None:
    assert of(SERVERS) == pytest.approx(10.0)
    assert of(replace(SERVERS, times=Flat(0.1))) == pytest.approx(4 / 0.1 / 10)
    assert of(replace(SERVERS, times=Flat(0.1), decodes=2)) == pytest.approx(8.0)


def test_memory_bounds_a_batch() -> None:
    two = replace(SERVERS, times=Flat(0.1), kv_tokens=2 * 1006)
    assert of(two) == pytest.approx(2.0, rel=0.01)


def test_online_prompts_take_their_prefill_time() -> None:
    """Those of the last second may be computed after the end."""
    half = [Ask(k / 5, 1000, 1) for k in range(50)]
    assert of(SERVERS, *half) == pytest.approx((100 - 45) / 10)


def test_what_cannot_be_served_in_time_is_told() -> None:
    flood = [Ask(0.5, 1000, 1) for _ in range(40)]
    assert of(SERVERS, *flood) == -1.0
    assert of(SERVERS, *flood, missing=20) > 0


def test_an_online_answer_needs_its_steps_and_its_pace() -> None:
    """Steps of 10 ms a sequence make 100 tokens a second, however they are shared."""
    servers = replace(SERVERS, times=Flat(0.0, 0.01), prefills=10)
    mix = Mix.of([SUMMARY], servers)

    def at(tpot_s: float) -> float:
        targets = Targets(ttft_s=0.5, tpot_s=tpot_s)
        online = [Ask(0.0, 10, 401)]
        return bound(servers, online, mix, targets, from_s=0.0, until_s=9.0).requests_per_s

    assert at(0.02) == pytest.approx((900 - 400) / 9 / 10, rel=0.01)
    assert at(0.009) == 0.0


@given(st.lists(st.integers(0, 3), max_size=4), st.integers(1, 3))
def test_it_is_what_the_best_of_all_schedules_serves(arrivals: list[int], wait: int) -> None:
    """A bin has room for one prompt; online ones come at its beginning, due some bins later."""
    bins = 5
    servers = replace(SERVERS, decodes=50)
    online = [Ask(float(at), 10_000, 1) for at in sorted(arrivals)]

    def keeps(schedule: tuple[int, ...]) -> bool:
        """Whether online ones in the bins with a 1 are all in time; the first goes first."""
        waiting: list[int] = []
        for now, goes in enumerate(schedule):
            waiting += [at + wait for at in sorted(arrivals) if at == now]
            if goes and waiting:
                waiting.pop(0)
            if any(due <= now + 1 for due in waiting):
                return False
        return True

    served = [bins - sum(it) for it in product((0, 1), repeat=bins) if keeps(it)]
    found = bound(
        servers,
        online,
        Mix.of([Ask(0.0, 10_000, 2)], servers),
        Targets(ttft_s=wait - 0.5, tpot_s=1.0),
        from_s=0.0,
        until_s=float(bins),
    )
    assert found.feasible == bool(served)
    assert found.requests_per_s * bins == pytest.approx(max(served, default=0), abs=1e-5)


def test_no_simulated_policy_serves_more() -> None:
    fleet = FleetEntry(
        server=(ServerEntry(role=Role.PREFILL), ServerEntry(role=Role.DECODE)), device="a100"
    )
    chat = WorkloadEntry(name="chat", rate=2.0, output_median=60.0, ttft_ms=5000.0, tpot_ms=40.0)
    batch = WorkloadEntry(name="batch", kind=Kind.OFFLINE, arrivals="backlog", count=400)
    for policies in (Policies(pools="none"), Policies(order="fcfs", pools="none")):
        policy = PolicyEntry(name="any", policies=policies)
        scenario = Scenario(
            fleet=(fleet,), workload=(chat, batch), policy=(policy,), duration_s=30.0, drain_s=5.0
        )
        plan = planned(scenario, Path())
        ran = World(plan, Case(policy=policy, load=1.0, seed=1)).run()
        online, offline = (list(it.asks) for it in prepared(plan, 1.0, 1).streams)
        decode = servers_of(fleet, Path())[-1]
        servers = Servers(
            prefills=1,
            decodes=1,
            times=decode.times,
            kv_tokens=decode.config.kv_tokens,
            max_running=decode.config.max_running,
        )
        served = sum(
            it.tokens_between(0, 30_000_000) for it in ran.records if it.kind is Kind.OFFLINE
        )
        most = bound(
            servers, online, Mix.of(offline, servers), Targets(ttft_s=5.0, tpot_s=0.04),
            from_s=0.0, until_s=30.0,
        )  # fmt: skip
        assert 0.3 * most.tokens_per_s < served / 30 <= most.tokens_per_s


def test_half_of_a_steady_mix_is_half_of_the_work() -> None:
    random = Random(1)
    many = [Ask(0.0, random.randrange(500, 1500), 11) for _ in range(200)]
    assert Mix.of(many, SERVERS).prefill_s == pytest.approx(0.1, rel=0.05)
    assert Mix.of(many[:100], SERVERS).steps == 10
