"""The contract of every registered rule of placement: a new one is held to it by its name."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import Core, Rules
from policies.breaker import Breaker, BreakerRule
from policies.displace import standing_of
from policies.events import Arrived, Dispatch, PrefillDone
from policies.ledger import Ledger
from policies.order import Edf, Outlook
from policies.place import CacheAware, LeastWork, PowerOfTwo
from policies.registry import DISPLACE, PLACE
from policies.types import Job, Worker
from tests.gateway.talk import SECOND, decode, online, prefill, unified

every_place = pytest.mark.parametrize("name", sorted(PLACE))
LOADS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), max_size=9)


def ledger(worker: Worker, prefills: int = 0, decodes: int = 0) -> Ledger:
    books = Ledger(worker, Breaker(BreakerRule()))
    for _ in range(prefills):
        books.add_prefill(1000, 0)
    for _ in range(decodes):
        books.add_decode(2000, 2500)
    books.dispatched = prefills + decodes
    return books


def fleet(loads: list[tuple[int, int]]) -> list[Ledger]:
    return [ledger(unified(f"u{i}"), *load) for i, load in enumerate(loads)]


def written(books: Ledger) -> list[object]:
    """All but what is only kept because it is dear to work out."""
    return [getattr(books, name) for name in Ledger.__slots__ if name not in ("line", "worker")]


@every_place
@given(loads=LOADS, tokens=st.integers(1, 10_000), keys=st.lists(st.integers(0, 5), max_size=4))
def test_every_server_gets_a_rank_and_the_same_one_again(
    name: str, loads: list[tuple[int, int]], tokens: int, keys: list[int]
) -> None:
    job, ledgers = online("a", tokens, prefixes=tuple(keys)), fleet(loads)
    if ledgers:
        ledgers[0].prefixes.add(keys)
    before = [written(each) for each in ledgers]
    for rank in ("prefill", "decode"):
        ranks = getattr(PLACE[name](), rank)(job, ledgers)
        assert len(ranks) == len(ledgers)
        assert all(rank == rank and abs(rank) < 1e13 for rank in ranks)
        assert ranks == getattr(PLACE[name](), rank)(job, ledgers)
    assert [written(each) for each in ledgers] == before


@every_place
def test_a_rule_has_no_state(name: str) -> None:
    place = PLACE[name]()
    assert dataclasses.is_dataclass(place)
    assert place == PLACE[name]()
    assert not hasattr(place, "__dict__")


@every_place
@given(st.lists(st.integers(1, 900), min_size=1, max_size=30))
def test_no_server_gets_more_than_it_may_have(name: str, prompts: list[int]) -> None:
    servers = [prefill(f"p{i}", chunk_tokens=300) for i in range(3)]
    servers += [decode(f"d{i}", kv_tokens=5000, max_running=4) for i in range(3)]
    core = Core(Rules(place=PLACE[name]()), servers)
    running: list[str] = []
    for number, tokens in enumerate(prompts):
        job = online(f"j{number}", tokens, number, prefixes=(tokens % 3,))
        decisions = core.handle([Arrived(job)], number)
        running += [it.job.id for it in decisions if isinstance(it, Dispatch)]
        if number % 4 == 3 and running:
            core.handle([PrefillDone(running.pop(0))], number)
        for books in core.ledgers.values():
            assert books.prefill_tokens <= 600 or books.prefills == 1
            assert books.decodes <= 4
            assert books.reserved_tokens <= 0.92 * 5000


@every_place
def test_a_free_server_takes_what_the_chosen_ones_cannot(name: str) -> None:
    servers = [prefill(f"p{i}", chunk_tokens=100) for i in range(4)]
    core = Core(Rules(place=PLACE[name]()), [*servers, decode()])
    jobs = [online(f"j{i}", 500, i, prefixes=(7,)) for i in range(4)]
    sent = [it for i, job in enumerate(jobs) for it in core.handle([Arrived(job)], i)]
    taken = sorted(it.prefill or "" for it in sent if isinstance(it, Dispatch))
    assert taken == ["p0", "p1", "p2", "p3"]


# Each by its own promise.


def drawn(job_id: str, count: int) -> list[int]:
    ranks = PowerOfTwo().prefill(online(job_id), fleet([(0, 0)] * count))
    return [index for index, rank in enumerate(ranks) if rank < 1e6]


def test_two_servers_are_drawn_and_each_as_often() -> None:
    draws = [drawn(str(number), 5) for number in range(2000)]
    assert {len(draw) for draw in draws} == {2}
    for server in range(5):
        assert 700 < sum(server in draw for draw in draws) < 900
    assert (drawn("a", 1), drawn("a", 2)) == ([0], [0, 1])


def test_of_the_two_the_less_busy_one_gets_it() -> None:
    first, second = drawn("a", 5)
    loads = [(0, 0)] * 5
    loads[first] = (3, 0)
    ranks = PowerOfTwo().prefill(online("a"), fleet(loads))
    assert min(range(5), key=ranks.__getitem__) == second


KEYS = (1, 2, 3, 4, 5)
"""Of a prompt of 1,024 tokens."""


def cache_aware(job: Job, *seen: tuple[int, ...], loads: list[tuple[int, int]]) -> int:
    ledgers = fleet(loads)
    for books, keys in zip(ledgers, seen, strict=True):
        books.prefixes.add(keys)
    ranks = CacheAware().prefill(job, ledgers)
    return min(range(len(ranks)), key=ranks.__getitem__)


def test_a_prompt_goes_where_most_of_it_is_cached() -> None:
    job = online("a", 1024, prefixes=KEYS)
    assert cache_aware(job, (), KEYS[:4], KEYS, loads=[(0, 0), (0, 0), (9, 0)]) == 2
    assert cache_aware(job, (), KEYS, KEYS, loads=[(0, 0), (9, 0), (3, 0)]) == 2


def test_a_small_part_is_not_worth_it() -> None:
    job = online("a", 1024, prefixes=KEYS)
    assert cache_aware(job, KEYS[:3], (), loads=[(0, 0), (9, 0)]) == 1


def test_uneven_loads_go_before_the_cache() -> None:
    job = online("a", 1024, prefixes=KEYS)
    assert cache_aware(job, KEYS, (), loads=[(70, 0), (0, 0)]) == 1
    assert cache_aware(job, KEYS, (), loads=[(60, 0), (0, 0)]) == 0


def test_a_prompt_that_made_way_goes_back_to_what_it_left_in_the_cache() -> None:
    servers = [ledger(prefill("p0")), ledger(prefill("p1"), 1)]
    job = online("a", 50_000, cached_tokens=30_000, cached_on="p1")
    first, second = LeastWork().prefill(job, servers)
    assert second < first


@pytest.mark.parametrize("name", sorted(DISPLACE))
@given(
    tokens=st.tuples(st.integers(1, 300_000), st.integers(1, 300_000)),
    seconds=st.integers(0, 60),
    times=st.integers(0, 30),
)
def test_nobody_makes_way_for_what_saves_nothing(
    name: str, tokens: tuple[int, int], seconds: int, times: int
) -> None:
    books, rule = ledger(prefill(chunk_tokens=8192)), DISPLACE[name]()
    books.prefill_rate.done(20_000, SECOND)
    now_us = seconds * SECOND
    standing = standing_of(online("a", tokens[0]), books, 0, times, now_us)
    assert standing is not None
    assert 0 <= standing.job.cached_tokens <= tokens[0]
    head, outlook = online("b", tokens[1], now_us), Outlook(now_us, 0.02)
    answers = {rule.makes_way(standing, head, Edf(), outlook) for _ in range(2)}
    assert len(answers) == 1
    assert answers == {False} or standing.rest_us > standing.lost_us
    assert answers == {False} or times < 10
