"""Keys that move: the heads are right at every look, the rest soon, and a look costs the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hrrn import Hrrn
from policies.moving import TURN_JOBS, Arrival, Arrivals, Moving
from policies.order import NO_OUTLOOK, Key, Order, Outlook
from policies.queue import KeyedHeap
from policies.salvage import Salvage
from policies.slack import Kairos
from policies.types import Job
from tests.gateway.talk import SECOND, online

ARRIVALS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 900), st.booleans()), min_size=1, max_size=150
)


@given(ARRIVALS)
def test_the_tokens_before_each_are_those_of_a_plain_list(
    made: list[tuple[int, int, bool]],
) -> None:
    arrivals, plain = Arrivals(), {}
    for number, (us, tokens, _) in enumerate(made):
        arrivals.add((us, str(number)), tokens)
        plain[us, str(number)] = tokens
    for number, (us, _, leaves) in enumerate(made):
        if leaves:
            arrivals.discard((us, str(number)))
            del plain[us, str(number)]
    before = list(accumulate((plain[each] for each in sorted(plain)), initial=0))
    assert [arrivals.before(each) for each in sorted(plain)] == before[:-1]
    walk, last = list[tuple[Arrival, int]](), (-1, "")
    while some := list(arrivals.after(last, 7)):
        walk += some
        last = some[-1][0]
    assert walk == list(zip(sorted(plain), before, strict=False))


@dataclass
class Queue:
    """A heap and its movement, as a lane keeps them."""

    order: Order

    def __post_init__(self) -> None:
        assert self.order.moves is not None
        self.heap: KeyedHeap[Key] = KeyedHeap()
        self.moving = self.order.moves()

    def put(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> None:
        self.moving.add(job)
        self.heap.put(job.id, self.moving.key(job, self.order, outlook))

    def look(self, outlook: Outlook) -> str | None:
        self.moving.turn(self.heap, self.order, outlook)
        return self.moving.first(self.heap, self.order, outlook)

    def take(self, job: Job) -> None:
        self.heap.discard(job.id)
        self.moving.discard(job)


def sorted_anew(jobs: list[Job], order: Order, outlook: Outlook) -> str:
    arrived = sorted(jobs, key=lambda job: (job.arrival_us, job.id))
    before = accumulate((job.prompt_tokens for job in arrived), initial=0)
    keys = [(order.key(j, outlook.behind(n)), j.id) for j, n in zip(arrived, before, strict=False)]
    return min(keys)[1]


@pytest.mark.parametrize("order", [Kairos(), Salvage(), Hrrn()])
def test_a_short_queue_is_in_order_at_every_look(order: Order) -> None:
    chance, queue, waiting = Random(1), Queue(order), list[Job]()
    for turn in range(300):
        now_us = turn * SECOND // 2
        if len(waiting) < TURN_JOBS:
            waiting.append(online(str(turn), chance.randint(1, 60_000), now_us))
            queue.put(waiting[-1])
        outlook = Outlook(now_us, 0.02 + 0.01 * chance.random(), 1, chance.randint(0, 9000))
        first = queue.look(outlook)
        assert first == sorted_anew(waiting, order, outlook)
        if turn % 3 == 0:
            gone = next(job for job in waiting if job.id == first)
            waiting.remove(gone)
            queue.take(gone)


@dataclass(frozen=True, slots=True)
class Sinking:
    """Keys that change once, when their deadline passes."""

    moves: ClassVar[type[Moving]] = Moving

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        return (int(outlook.now_us > job.deadline_us), job.prompt_tokens)


def test_in_a_long_queue_every_key_is_seen_to_within_one_look_a_block() -> None:
    queue = Queue(Sinking())
    jobs = [online(f"{number:04}", 1000 - number % 900, number) for number in range(1000)]
    for job in jobs:
        queue.put(job)
    for job in jobs[3::7]:  # so that no block of them is full
        queue.take(job)
    late = Outlook(now_us=3 * SECOND)
    for _ in range(-(-len(jobs) // TURN_JOBS) + 1):
        queue.look(late)
    assert all(key[0] == 1 for key in queue.heap.entries.values())


class Noting(KeyedHeap[Key]):
    """A heap that tells what is put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.puts = list[str]()

    def put(self, entry: str, key: Key) -> None:
        self.puts.append(entry)
        super().put(entry, key)


@pytest.mark.parametrize("order", [Sinking(), Kairos(), Salvage()])
def test_a_key_that_stays_is_not_put_into_the_heap_again(order: Order) -> None:
    queue, heap = Queue(order), Noting()
    queue.heap = heap
    for number in range(TURN_JOBS):
        queue.put(online(str(number), at_us=0))
    heap.puts.clear()
    queue.look(NO_OUTLOOK)
    assert not heap.puts
    queue.look(Outlook(now_us=3 * SECOND))
    assert heap.puts


@dataclass(frozen=True, slots=True)
class Backwards:
    """All that wait fall behind whoever was looked at."""

    moves: ClassVar[type[Moving]] = Moving

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        return (outlook.now_us,)


def test_heads_that_all_lose_their_place_end_the_search() -> None:
    queue = Queue(Backwards())
    for number in range(500):
        queue.put(online(str(number), at_us=number))
    assert queue.look(Outlook(now_us=7)) is not None
    assert 0 < sum(key == 7 for key, _ in queue.heap.entries.values()) < 3 * TURN_JOBS


class Counted(KeyedHeap[Key]):
    """Counts what is put anew."""

    puts = 0

    def put(self, entry: str, key: Key) -> None:
        self.puts += 1
        super().put(entry, key)


def test_keys_that_have_not_moved_are_not_put_anew() -> None:
    queue = Queue(Salvage())
    queue.heap = counted = Counted()
    for number in range(100):
        queue.put(online(f"{number:03}", 1000 - number))
    assert queue.look(Outlook(now_us=1)) == "099"
    assert counted.puts == 100


def test_a_head_that_stays_the_head_ends_the_search() -> None:
    queue = Queue(Backwards())
    queue.heap = counted = Counted()
    for name in "ab":
        queue.put(online(name))
    assert queue.look(Outlook(now_us=7)) == "a"
    assert counted.puts == 4


def test_an_empty_queue_has_no_head() -> None:
    assert Queue(Kairos()).look(NO_OUTLOOK) is None
