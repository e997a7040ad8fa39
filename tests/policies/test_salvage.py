"""Who can still be in time goes first, also in a queue too long to look through."""

from __future__ import annotations

from random import Random

import pytest

from policies.moving import TURN_JOBS
from policies.order import Outlook
from policies.salvage import GUARD_TARGETS, LOOK_JOBS, Salvage
from policies.types import Job
from tests.gateway.talk import SECOND, online
from tests.policies.test_moving import Queue, sorted_anew

RATE = 0.02


def at(now_us: float, rate: float = RATE) -> Outlook:
    return Outlook(round(now_us), rate)


def filled(jobs: list[Job]) -> Queue:
    queue = Queue(Salvage())
    for job in jobs:
        queue.put(job, at(job.arrival_us))
    return queue


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_in_a_long_queue_the_head_is_that_of_a_queue_sorted_anew(seed: int) -> None:
    """Prompts come, become late, outlast their guard and go; the servers change their speed."""
    chance, queue, waiting = Random(seed), Queue(Salvage()), dict[str, Job]()
    late = 0
    for turn in range(600):
        outlook = at(turn * SECOND / 10, RATE * (1 + 0.1 * (turn // 60 % 2)))
        for number in range(2):
            target_us = chance.randint(1, 9) * SECOND
            job = online(f"{turn}-{number}", chance.randint(1, 60_000), outlook.now_us)
            job = job._replace(deadline_us=job.arrival_us + target_us)
            waiting[job.id] = job
            queue.put(job, outlook)
        first = queue.look(outlook)
        assert first == sorted_anew(list(waiting.values()), queue.order, outlook)
        late += outlook.now_us > waiting[first].deadline_us
        if turn % 3:
            queue.take(waiting.pop(first))
    assert len(waiting) > 500
    assert late > 20


def test_a_look_sees_to_so_many_and_no_more() -> None:
    """All were in time and none is any more: they fall behind as they come up."""
    jobs = [online(f"{it:04}", 1 + it, deadline_us=SECOND) for it in range(500)]
    queue = filled(jobs)
    fresh = online("fresh", 100_000, 2 * SECOND, deadline_us=9 * SECOND)
    queue.put(fresh, at(2 * SECOND))
    looks = 0
    while queue.look(at(2 * SECOND)) != "fresh":
        looks += 1
        doomed = sum(key[0] for key in queue.heap.entries.values())
        assert doomed == looks * LOOK_JOBS
    assert looks == len(jobs) // LOOK_JOBS


def test_a_guard_comes_to_the_microsecond_at_any_depth() -> None:
    others = [online(f"{it:04}", 500 + it, deadline_us=3600 * SECOND) for it in range(1000)]
    queue = filled([*others, online("old", 10, deadline_us=SECOND)])
    assert queue.look(at(0)) == "old"
    guard_us = GUARD_TARGETS * SECOND
    assert queue.look(at(guard_us)) == "0000"
    assert queue.look(at(guard_us + 1)) == "old"


def test_faster_servers_save_whose_deadline_lies_ahead() -> None:
    others = [online(f"{it:04}", 90_000, deadline_us=3600 * SECOND) for it in range(100)]
    late = [online(f"late-{it}", 50_000, deadline_us=2 * SECOND) for it in range(3 * TURN_JOBS)]
    queue = filled([*others, *late])
    assert queue.look(at(SECOND // 2)) == "0000"
    found = [queue.look(at(SECOND, rate=3 * RATE)) for _ in range(3)]
    assert found == ["late-10", "late-10", "late-0"], "a third of them at each look"
    assert sum(key[0] for key in queue.heap.entries.values()) == 0


def test_who_left_is_forgotten() -> None:
    jobs = [online(str(it), 50_000, deadline_us=SECOND) for it in range(20)]
    queue = filled(jobs)
    for job in jobs:
        queue.take(job)
    assert queue.look(at(SECOND // 2)) is None
    assert queue.look(at(9 * SECOND)) is None
