"""One run of the simulator: what is served, what is remembered of it, and how a run ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backends.workload import Ask, Trace
from gateway.config import Admission, Limits, Policies
from gateway.scenario import FleetEntry, PolicyEntry, ServerEntry, WorkloadEntry
from gateway.simulation.plan import Plan, Source
from gateway.simulation.records import PARTS, Ended, Record
from gateway.simulation.world import GATEWAY_ONLINE
from policies.types import Kind, Pool, Role
from tests.gateway.simulation.scenarios import (
    CHAT,
    NOWHERE,
    PAIR,
    UNIFIED,
    fleet,
    plan,
    ran,
    slow_gateway,
)

BOTH = pytest.mark.parametrize("servers", [PAIR, UNIFIED], ids=["pair", "unified"])


def replaying(entry: WorkloadEntry, *rows: Ask, **more: object) -> Plan:
    """A plan whose only workload is this trace."""
    entry = replace(entry, arrivals="trace", trace="made up")
    base = plan(**more)  # type: ignore[arg-type]  # what plan() takes
    source = Source(entry, Trace(NOWHERE, tuple(rows)))
    return replace(base, scenario=replace(base.scenario, workload=(entry,)), sources=(source,))


@BOTH
def test_every_request_of_a_light_day_is_served_whole(servers: tuple[ServerEntry, ...]) -> None:
    records = ran(plan(servers=servers)).records
    assert len(records) > 30
    assert {it.ended for it in records} == {Ended.FINISHED}
    assert all(it.generated == it.output_tokens for it in records)


@BOTH
def test_times_of_a_request_are_in_order_and_add_up(servers: tuple[ServerEntry, ...]) -> None:
    for record in ran(plan(servers=servers)).records:
        inner = (record.dispatched_us, record.sent_us, record.began_us, record.computed_us)
        marks = [record.arrival_us, *inner, record.first_us, record.last_us]
        known = [it for it in marks if it is not None]
        assert len(known) == 7
        assert known == sorted(known)
        assert sum(record.parts_us()) == known[-1] - known[0]
        assert len(record.parts_us()) == len(PARTS)


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    first, second, other = (ran(plan(), seed=seed).records for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_policies_are_compared_on_the_same_requests() -> None:
    fcfs = PolicyEntry(name="fcfs", policies=Policies(order="fcfs", place="round-robin"))
    base = plan(policy=(PolicyEntry(name="edf"), fcfs))
    edf, other = (ran(base, policy=policy) for policy in base.scenario.policy)

    def asked(records: list[Record]) -> list[tuple[int, int, int]]:
        return [(it.arrival_us, it.prompt_tokens, it.output_tokens) for it in records]

    assert asked(edf.records) == asked(other.records)


def test_the_gateways_own_delays_are_part_of_every_latency() -> None:
    one = Ask(1.0, 1000, 20)
    quick, slow = (
        ran(replaying(CHAT, one, fleet=(fleet(noise=0.0),), gateway=slow_gateway(ms))).records[0]
        for ms in (0.0, 25.0)
    )
    assert (slow.ttft_us or 0) - (quick.ttft_us or 0) == pytest.approx(50_000, abs=5)


def test_a_prefix_that_was_sent_before_is_not_computed_again() -> None:
    entry = replace(CHAT, prefix_groups=1)
    records = ran(
        replaying(entry, Ask(0.0, 2000, 5, 1500), Ask(5.0, 2000, 5, 1500), Ask(6.0, 2000, 5))
    ).records
    assert [it.cached_tokens for it in records] == [0, 1500, 0]
    assert [it.computed_tokens for it in records] == [2000, 500, 2000]
    assert sum(it.wasted_tokens for it in records) == 0


def test_what_a_full_queue_refuses_is_remembered_as_refused() -> None:
    policy = PolicyEntry(name="short", limits=Limits(max_queued=2))
    rows = [Ask(0.001 * i, 4000, 20) for i in range(40)]
    records = ran(replaying(CHAT, *rows, policy=(policy,)), policy=policy).records
    refused = [it for it in records if it.ended is Ended.REJECTED]
    assert {it.reason for it in refused} == {"queue_full"}
    assert not any(it.keeps_all or it.first_us for it in refused)


def test_what_does_not_end_in_time_is_unfinished_and_keeps_nothing() -> None:
    rows = [Ask(0.0, 3000, 200) for _ in range(60)]
    records = ran(replaying(CHAT, *rows, drain_s=1.0, duration_s=0.5)).records
    unfinished = [it for it in records if it.ended is Ended.UNFINISHED]
    assert unfinished
    assert not any(it.keeps_all for it in unfinished)
    assert any(it.generated for it in unfinished)


def test_a_closed_loop_has_as_many_requests_open_as_clients() -> None:
    entry = replace(CHAT, arrivals="closed", clients=3)
    records = ran(plan(entry)).records
    edges = [(it.arrival_us, 1) for it in records] + [(it.last_us or 0, -1) for it in records]
    open_now, most = 0, 0
    for _, step in sorted(edges):
        open_now += step
        most = max(most, open_now)
    assert most == 3
    assert len(records) > 10


def test_a_backlog_is_there_from_the_beginning() -> None:
    entry = replace(CHAT, name="batch", kind=Kind.OFFLINE, arrivals="backlog", count=25)
    records = ran(plan(entry)).records
    assert {it.arrival_us for it in records} == {0}
    assert len(records) == 25


def test_a_sweep_scales_the_workloads_that_it_names() -> None:
    batch = replace(CHAT, name="batch", kind=Kind.OFFLINE)
    counts = []
    for load in (1.0, 3.0):
        records = ran(plan(CHAT, batch), load=load).records
        counts.append([sum(it.workload == name for it in records) for name in ("chat", "batch")])
    assert counts[1][0] > 2 * counts[0][0]
    assert counts[1][1] == counts[0][1]


def test_a_server_that_joins_later_serves_then_and_is_paid_from_its_start() -> None:
    late = ServerEntry(role=Role.UNIFIED, name="late", joins_s=2.0, start_up_s=3.0)
    run = ran(plan(replace(CHAT, rate=30.0), servers=(*UNIFIED, late)))
    sent = [it.sent_us for it in run.records if it.decode == "late-1"]
    assert min(it for it in sent if it is not None) >= 5_000_000
    assert run.facts.gpu_s == pytest.approx(2 * run.facts.ended_us / 1e6 - 2.0)


def test_pools_are_those_of_the_scenario() -> None:
    relaxed = replace(PAIR[1], name="relaxed", pool=Pool.RELAXED)
    batch = replace(CHAT, name="batch", kind=Kind.OFFLINE)
    records = ran(plan(CHAT, batch, servers=(*PAIR, relaxed))).records
    assert {it.decode for it in records if it.workload == "batch"} == {"relaxed-1"}
    assert {it.decode for it in records if it.workload == "chat"} == {"decode-1"}


def test_a_timeline_tells_where_requests_were() -> None:
    timeline = ran(plan(replace(CHAT, rate=60.0))).timeline
    assert set(timeline.waiting) >= {GATEWAY_ONLINE, "prefill servers, strict"}
    assert all(len(it) == len(timeline.times_s) for it in timeline.waiting.values())
    assert max(timeline.running["decode servers, strict"]) > 1


def test_a_tight_cap_at_prefill_moves_the_wait_into_the_gateway() -> None:
    rows = [Ask(0.0, 3000, 5) for _ in range(20)]
    waits = []
    for chunks in (1, 16):
        admission = Admission(prefill_chunks=chunks)
        policy = PolicyEntry(name="caps", admission=admission)
        records = ran(replaying(CHAT, *rows, policy=(policy,)), policy=policy).records
        waits.append(sum(it.parts_us()[0] for it in records))
    assert waits[0] > 2 * waits[1]


def test_a_slower_server_takes_longer() -> None:
    def ttft_us(speed: float) -> int:
        servers = tuple(replace(it, speed=speed, ingest_ms=0.0) for it in PAIR)
        entry: FleetEntry = fleet(*servers, noise=0.0)
        return ran(replaying(CHAT, Ask(0.0, 4000, 5), fleet=(entry,))).records[0].ttft_us or 0

    assert ttft_us(0.5) == pytest.approx(2 * ttft_us(1.0), rel=0.1)
