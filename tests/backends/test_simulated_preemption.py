"""A day of traffic in virtual time, with policies that take offline work off its servers."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from gateway.core import Rules
from policies.clock import VirtualClock
from policies.colocation import Colocated
from policies.events import (
    Dispatch,
    Event,
    Fail,
    Failed,
    Finished,
    Preempt,
    Preempted,
    Recall,
    Reject,
)
from policies.order import Edf
from policies.pools import ByLatency
from policies.preempt import AbortRule, ForSlack
from policies.retry import RetryRule
from policies.steps import Costs
from policies.types import Job, Kind, Role
from tests.gateway.talk import offline, online
from tests.policies.sites import COST
from tests.simulated_fleet import Fleet, left_over

RULES = Rules(
    order=Edf(),
    pools=ByLatency(lends=True),
    admit=Colocated(ttft_us=300_000, tpot_us=12_000),
    give_way=ForSlack(tpot_us=12_000, ttft_share=0.1),
    aborts=AbortRule(per_s=50),
    costs=Costs(default=COST),
    retry=RetryRule(backoff_us=100_000),
)
ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE, Role.PREFILL)


class Heard(Fleet):
    """Adds up what the core hears of each job."""

    def __init__(self, seed: int, rules: Rules = RULES, **options: Any) -> None:
        self.virtual = VirtualClock()
        super().__init__(self.virtual, ROLES, rules, seed, **options)
        self.made: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.backend.connect(self.hear)

    def hear(self, event: Event) -> None:
        match event:
            case Finished(job_id, generated):
                self.ends[job_id] += 1
                self.made[job_id] += generated
            case Failed(job_id):
                self.made[job_id] += event.generated
            case Preempted(job_id, generated, lost):
                self.made[job_id] += generated
                self.lost[job_id] += lost
            case _:
                pass
        self.driver.post(event)

    def decided(self, kind: type[Any]) -> list[Any]:
        return [decision for _, decision in self.trace if isinstance(decision, kind)]


def day(seed: int, count: int) -> list[tuple[Job, int]]:
    """A few short online jobs among long offline ones."""
    rng = random.Random(seed)
    jobs = []
    for i in range(count):
        at_us = rng.randrange(6_000_000)
        if rng.random() < 0.5:
            job = online(f"j{i:03}", rng.randint(20, 400), at_us, tpot_us=12_000)
            job = job._replace(deadline_us=at_us + 300_000)
        else:
            job = offline(f"j{i:03}", rng.randint(500, 6000), at_us)
        jobs.append((job._replace(max_tokens=150), rng.randint(1, 140)))
    return jobs


@pytest.mark.parametrize("seed", range(6))
def test_every_job_ends_once_with_all_its_tokens(seed: int) -> None:
    fleet = Heard(seed, kv_tokens=24_000)
    jobs = day(seed, 120)
    for job, tokens in jobs:
        fleet.ask(job, tokens)
    fleet.poll()
    fleet.virtual.run(3600.0)
    refused = {it.job.id for it in fleet.decided(Reject)}
    served = {job.id: tokens for job, tokens in jobs if job.id not in refused}
    assert fleet.ends == dict.fromkeys(served, 1)
    assert {name: fleet.made[name] for name in served} == served
    assert (left_over(fleet), fleet.decided(Preempt) != []) == ({}, True)


@pytest.mark.parametrize("seed", range(6))
def test_only_offline_work_gives_way_and_no_more_of_it_than_is_allowed(seed: int) -> None:
    fleet = Heard(seed, kv_tokens=24_000)
    for job, tokens in day(seed, 120):
        fleet.ask(job, tokens)
    fleet.poll()
    fleet.virtual.run(3600.0)
    taken = [(us, it) for us, it in fleet.trace if isinstance(it, Preempt)]
    assert all(it.job.kind is Kind.OFFLINE for _, it in taken)
    last_s = taken[-1][0] / 1e6
    assert len(taken) <= RULES.aborts.burst + RULES.aborts.per_s * last_s
    assert fleet.core.accounts.preemptions.total() == len(taken)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_recalled_and_whoever_dies_nothing_is_lost(seed: int) -> None:
    fleet = Heard(seed, kv_tokens=24_000)
    rng = random.Random(seed)
    jobs = day(seed, 60)
    for job, tokens in jobs:
        fleet.ask(job, tokens)
    for _ in range(200):
        name = f"j{rng.randrange(60):03}"
        fleet.at(rng.uniform(0, 8), fleet.driver.post, Recall(name))
    victim = fleet.backend.engines["decode2"]
    fleet.at(rng.uniform(1, 4), victim.kill)
    fleet.poll()
    fleet.virtual.run(3600.0)
    refused = {it.job.id for it in [*fleet.decided(Reject), *fleet.decided(Fail)]}
    served = {job.id: tokens for job, tokens in jobs if job.id not in refused}
    assert {name: fleet.made[name] for name in served} == served
    assert left_over(fleet) == {}


def test_an_offline_job_that_is_taken_off_over_and_over_still_ends() -> None:
    """A burst of online prompts for as long as it would take to be done twice over."""
    fleet = Heard(1, kv_tokens=24_000)
    fleet.ask(offline("a", 9000, max_tokens=200), 120)
    for i in range(400):
        at_us = 50_000 + i * 20_000
        job = online(f"o{i:03}", 300, at_us, max_tokens=20, tpot_us=12_000)
        fleet.ask(job._replace(deadline_us=at_us + 300_000), 10)
    fleet.poll()
    fleet.virtual.run(12.0)
    assert fleet.ends["a"] == 1
    dispatched = [it for it in fleet.decided(Dispatch) if it.job.id == "a"]
    assert len(dispatched) <= 2 + len([it for it in fleet.decided(Preempt) if it.job.id == "a"])
