"""The small policies: order, admission, placement, pools, each by its own promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admit import Headroom
from policies.breaker import Breaker, BreakerRule
from policies.ledger import Ledger
from policies.order import Edf, Fcfs
from policies.place import LeastWork, RoundRobin
from policies.registry import ORDER, PLACE, POOLS, PREEMPT
from policies.types import Worker
from tests.gateway.talk import decode, load, online, prefill, unified


def ledger(worker: Worker) -> Ledger:
    return Ledger(worker, Breaker(BreakerRule()))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500))
def test_an_empty_server_takes_whatever_fits_at_all(kv: int, prompt: int, answer: int) -> None:
    books, job = ledger(decode(kv_tokens=kv)), online("a", prompt, max_tokens=answer)
    assert Headroom().decode(job, books) is Headroom().fits_ever(job, books)


@given(st.lists(st.integers(1, 400), max_size=20), st.integers(100, 2000))
def test_headroom_promises_no_more_than_the_watermark(prompts: list[int], kv: int) -> None:
    books, admit = ledger(decode(kv_tokens=kv)), Headroom(output_reserve_tokens=20)
    for tokens in prompts:
        job = online("a", tokens)
        if admit.decode(job, books):
            books.add_decode(tokens, admit.reserved(job))
    assert books.decodes < 2 or books.reserved_tokens <= kv


@given(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=6),
    st.integers(1, 20_000),
    st.sampled_from(["", "p0", "p1"]),
)
def test_all_servers_are_asked_as_each_would_be(
    outstanding: list[int], prompt: int, cached_on: str
) -> None:
    books = [ledger(prefill(f"p{index}")) for index in range(len(outstanding))]
    for each, tokens in zip(books, outstanding, strict=True):
        if tokens:
            each.add_prefill(tokens, 0)
    job = online("a", prompt, cached_tokens=prompt // 2, cached_on=cached_on)
    admit = Headroom(prefill_cap_tokens=16_384)
    assert admit.prefills(job, books) == [e for e in books if admit.prefill(job, e)]


def test_a_server_of_unknown_size_takes_anything() -> None:
    assert Headroom().decode(online("a", 10**9), ledger(decode()))


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_more_context_is_never_a_better_rank(context: int, more: int) -> None:
    less_busy, busier = ledger(decode()), ledger(decode())
    less_busy.add_decode(context, context)
    busier.add_decode(context + more, context + more)
    job = online("a")
    better, worse = LeastWork().decode(job, [less_busy, busier])
    assert better < worse


def test_the_work_of_others_counts_for_placement() -> None:
    crowded = ledger(decode())
    crowded.correct(load(5000))
    crowded.correct(load(5000))
    empty_rank, crowded_rank = LeastWork().decode(online("a"), [ledger(decode()), crowded])
    assert empty_rank < crowded_rank


def test_round_robin_sees_only_turns() -> None:
    busy = ledger(unified())
    busy.add_prefill(9999, 0)
    assert RoundRobin().prefill(online("a"), [busy]) == [0]


def test_orders_differ_where_the_later_job_is_more_urgent() -> None:
    early, late = online("early"), online("late", at_us=5, deadline_us=9)
    assert Fcfs().key(early) < Fcfs().key(late)
    assert Edf().key(late) < Edf().key(early)


@pytest.mark.parametrize("registry", [ORDER, PLACE, POOLS, PREEMPT])
def test_every_registered_policy_needs_no_argument(registry: dict[str, type[object]]) -> None:
    for name, policy in registry.items():
        assert repr(policy())
        assert name == name.lower()
