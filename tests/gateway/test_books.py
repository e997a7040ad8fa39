from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.books import Lane, Ticket
from gateway.servers import Fleet
from policies.breaker import Breaker, BreakerRule
from policies.events import Load
from policies.ledger import Ledger
from policies.order import NO_OUTLOOK, Fcfs
from policies.pools import ByLatency, Shared
from policies.steps import Costs
from policies.types import Kind, Pool, Worker
from tests.gateway.talk import decode, offline, online, prefill, unified


def ledger(worker: Worker) -> Ledger:
    return Ledger(worker, Breaker(BreakerRule()))


def booked(*ledgers: Ledger) -> list[int]:
    return [
        abs(e.prefills) + e.prefill_tokens + e.decodes + e.context_tokens + e.reserved_tokens
        for e in ledgers
    ]


STEPS = st.lists(st.sampled_from(["prefilled", "release"]) | st.integers(0, 400))


@given(STEPS, st.booleans(), st.integers(1, 500), st.integers(0, 900))
def test_whatever_happens_in_between_the_books_return_to_zero(
    steps: list[str | int],
    alone: bool,  # noqa: FBT001  # hypothesis passes it by position
    prompt: int,
    reserved: int,
) -> None:
    one, other = ledger(unified("u")), ledger(decode("d"))
    ticket = Ticket(online("a", prompt))
    ticket.book(one, one if alone else other, prompt + reserved, 0)
    for step in steps:
        if isinstance(step, int):
            ticket.grow(step, 0)
        elif step == "prefilled":
            ticket.prefilled(10)
        else:
            ticket.release()
    ticket.release()
    assert booked(one, other) == [0, 0]


@given(st.lists(st.integers(0, 400), min_size=1))
def test_an_answer_grows_and_never_shrinks(reports: list[int]) -> None:
    books, ticket = ledger(unified()), Ticket(online("a", 100))
    ticket.book(books, books, 300, 0)
    for generated in reports:
        ticket.grow(generated, 0)
    assert books.context_tokens == 100 + max(reports)
    assert books.reserved_tokens == max(300, books.context_tokens)


def test_a_second_attempt_is_booked_afresh() -> None:
    first, second = ledger(unified("u1")), ledger(unified("u2"))
    ticket = Ticket(online("a", 100))
    ticket.book(first, first, 200, 0)
    ticket.grow(50, 0)
    ticket.release()
    ticket.book(second, second, 200, 0)
    ticket.grow(10, 0)
    assert booked(first) == [0]
    assert (second.context_tokens, second.dispatched) == (110, 1)


def test_no_pace_is_taken_over_a_time_in_which_nobody_was_asked_for_it() -> None:
    books = ledger(unified())
    chat, batch = Ticket(online("a", 100)), Ticket(offline("b", 100))
    chat.book(books, books, 200, 0)
    for tick in range(1, 100):
        if tick in (10, 80):
            batch.book(books, books, 200, 0)
        if tick == 20:
            batch.release()
        chat.grow(10 * tick, tick * 100_000)
    assert books.online.pace_us == pytest.approx(10_000)


def test_a_lane_counts_the_tokens_of_each_kind() -> None:
    lane = Lane("m")
    lane.put(online("a", 10), Fcfs(), NO_OUTLOOK)
    lane.put(offline("b", 500), Fcfs(), NO_OUTLOOK)
    assert lane.waiting_tokens == {Kind.ONLINE: 10, Kind.OFFLINE: 500}
    assert lane.take(offline("b", 500))
    assert not lane.take(offline("b", 500))
    assert lane.waiting_tokens[Kind.OFFLINE] == 0


def test_who_is_set_aside_is_queued_but_does_not_wait_in_line() -> None:
    lane, job = Lane("m"), offline("a", 10)
    lane.put(job, Fcfs(), NO_OUTLOOK)
    lane.set_aside(job)
    assert (lane.queued(Kind.OFFLINE), lane.offline.peek(), len(lane)) == (1, None, 1)
    assert lane.take(job)
    assert len(lane) == 0


def fleet(*workers: Worker) -> Fleet:
    new = Fleet(BreakerRule(), ByLatency(), Costs())
    for worker in workers:
        new.add(worker)
    return new


def test_candidates_come_in_the_order_of_their_names() -> None:
    new = fleet(prefill("b"), decode("z"), unified("m"), prefill("a"), decode("c"))
    found = new.own("", Kind.ONLINE).pool
    assert [e.worker.name for e in found.prefills] == ["a", "b"]
    assert [e.worker.name for e in found.decodes] == ["c", "z"]
    assert [e.worker.name for e in found.unified] == ["m"]


def test_a_server_serves_its_model_and_a_nameless_one_any() -> None:
    new = fleet(unified("x", model="x"), unified("any"))
    names = {m: [e.worker.name for e in new.own(m, Kind.ONLINE).pool.unified] for m in "xy"}
    assert names == {"x": ["any", "x"], "y": ["any"]}


def test_a_reload_may_change_the_pools() -> None:
    new = fleet(unified("s"), unified("r", pool=Pool.RELAXED))
    assert len(new.own("", Kind.ONLINE).pool.unified) == 1
    new.adopt(BreakerRule(), Shared(), Costs())
    assert len(new.own("", Kind.ONLINE).pool.unified) == 2


def test_a_server_that_is_gone_changes_nothing_any_more() -> None:
    new = fleet(unified("u"))
    ledger = new.ledgers["u"]
    new.correct(ledger, Load(seen_us=0, running=0, waiting=0, used_tokens=0, total_tokens=0), 50)
    for _ in range(BreakerRule().failures):
        ledger.breaker.failed(0)
    assert (new.has_tripped, new.changes_us(10)) == (True, [BreakerRule().cooldown_us, 50])
    new.remove("u")
    assert (new.has_tripped, new.changes_us(10), new.forget_stale(60)) == (False, [], False)


def test_servers_that_are_gone_and_empty_are_forgotten() -> None:
    new = fleet(unified("keep"))
    for i in range(50):
        new.add(unified(f"u{i}"))
        new.remove(f"u{i}")
    assert len(new._retired) == 1
    assert not new.remove("nobody")


def test_without_the_failed_a_leg_that_has_no_other_stays() -> None:
    found = fleet(prefill("p"), decode("d1"), decode("d2")).own("", Kind.ONLINE).pool
    others = found.without(("p", "d1"))
    assert [e.worker.name for e in others.prefills + others.decodes] == ["p", "d2"]


def test_who_is_more_urgent_than_all_that_wait_would_be_first() -> None:
    lane, order = Lane("m"), Fcfs()
    lane.put(online("a", 10)._replace(arrival_us=5), order, NO_OUTLOOK)
    assert lane.would_be_first(online("b", 10)._replace(arrival_us=4), order)
    assert not lane.would_be_first(online("c", 10)._replace(arrival_us=5), order)
    assert lane.would_be_first(offline("d", 10)._replace(arrival_us=9), order)
