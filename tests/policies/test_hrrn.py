"""The largest ratio is found among the oldest of each length."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hrrn import Hrrn, length_step, waited_share
from policies.moving import TURN_JOBS
from policies.order import Outlook, remaining_tokens
from policies.types import Job
from tests.gateway.talk import SECOND, online
from tests.policies.test_moving import Queue, sorted_anew

LENGTHS = st.integers(1, 2**20)


@given(LENGTHS, LENGTHS)
def test_lengths_of_one_step_are_within_a_quarter(one: int, other: int) -> None:
    short, long = sorted((one, other))
    assert length_step(short) <= length_step(long)
    assert length_step(short) < length_step(long) or 4 * long < 5 * short


def test_a_prompt_of_256_k_tokens_is_on_the_72nd_step_at_most() -> None:
    assert len({length_step(it) for it in range(1, 2**18)}) <= 72


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_in_a_long_queue_nobody_has_five_quarters_of_the_ratio_of_who_goes(seed: int) -> None:
    chance, queue, waiting = Random(seed), Queue(Hrrn()), dict[str, Job]()
    for turn in range(300):
        now_us = turn * SECOND // 4
        for number in range(3):
            tokens = round(chance.lognormvariate(7, 1.5)) + 1
            job = online(f"{turn}-{number}", tokens, now_us - chance.randint(0, SECOND))
            waiting[job.id] = job
            queue.put(job)
        first = queue.look(Outlook(now_us))
        assert first is not None
        shares = {
            it.id: waited_share(now_us - it.arrival_us, remaining_tokens(it))
            for it in waiting.values()
        }
        assert 5 * (shares[first] + 1) >= 4 * max(shares.values())
        queue.take(waiting.pop(first))
    assert len(waiting) == 600


def test_of_equal_lengths_the_choice_is_that_of_a_queue_sorted_anew() -> None:
    """One length a step: 32, 64, 128 ... tokens."""
    chance, queue, waiting = Random(4), Queue(Hrrn()), dict[str, Job]()
    for turn in range(100):
        now_us = turn * SECOND
        for number in range(2):
            job = online(f"{turn}-{number}", 32 << chance.randint(0, 9), now_us)
            waiting[job.id] = job
            queue.put(job)
        first = queue.look(Outlook(now_us))
        assert first == sorted_anew(list(waiting.values()), Hrrn(), Outlook(now_us))
        queue.take(waiting.pop(first))


def test_a_longer_queue_compares_no_more() -> None:
    queue = Queue(Hrrn())
    for number in range(5000):
        queue.put(online(str(number), 200 + number % 50, number))
    assert len(queue.moving._compared()) <= TURN_JOBS  # type: ignore[attr-defined]
