"""The contract of every order: a new one is held to it as soon as it has a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import Core, Rules
from gateway.simulation.oracles import SrpfOracle
from policies.events import Arrived, Decision, Dispatch, PrefillDone
from policies.moving import HEADS, TURN_JOBS
from policies.order import NO_OUTLOOK, Key, Order, Outlook
from policies.registry import ORDER
from policies.types import Job
from tests.gateway.talk import SECOND, Talk, decode, online, prefill


def answer_left(job: Job) -> int:
    """What an oracle is told, for the sake of the test."""
    return job.prompt_tokens % 7


EVERY: dict[str, Callable[[], Order]] = {
    **ORDER,
    "srpf-oracle": lambda: SrpfOracle(answer_left),
}
every_order = pytest.mark.parametrize("name", sorted(EVERY))

JOBS = st.builds(
    online,
    st.sampled_from(["a", "b", "c"]),
    tokens=st.integers(1, 200_000),
    at_us=st.integers(0, 10**12),
    deadline_us=st.integers(0, 2 * 10**12),
    cached_tokens=st.integers(0, 300_000),
)
OUTLOOKS = st.builds(
    Outlook,
    now_us=st.integers(0, 2 * 10**12),
    tokens_per_us=st.just(0.0) | st.floats(1e-6, 10),
    servers=st.integers(1, 500),
    ahead_tokens=st.integers(0, 10**10),
)


@every_order
@given(job=JOBS, outlook=OUTLOOKS)
def test_the_same_question_has_the_same_answer(name: str, job: Job, outlook: Outlook) -> None:
    key = EVERY[name]().key(job, outlook)
    assert key == EVERY[name]().key(job, outlook)
    assert all(type(part) is int for part in key)


@every_order
@given(job=JOBS, outlook=OUTLOOKS)
def test_an_order_that_does_not_move_sees_nothing_but_the_job(
    name: str, job: Job, outlook: Outlook
) -> None:
    order = EVERY[name]()
    assert order.moves or order.key(job, outlook) == order.key(job)


@every_order
def test_an_order_has_no_state(name: str) -> None:
    order = EVERY[name]()
    assert dataclasses.is_dataclass(order)
    assert order == EVERY[name]()
    assert not hasattr(order, "__dict__")


@every_order
def test_ties_go_by_the_id(name: str) -> None:
    talk = Talk([prefill(chunk_tokens=100), decode()], Rules(order=EVERY[name]()))
    talk.say(Arrived(online("first", 500)))
    talk.say(*(Arrived(online(each, 200)) for each in ("c", "a", "d", "b")))
    gone = [talk.say(PrefillDone(each))[0][1] for each in ("first", "a", "b", "c")]
    assert gone == ["a", "b", "c", "d"]


class Counting:
    """Another order that tells how often it is asked."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.moves = order.moves
        self.asked = 0

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        self.asked += 1
        return self._order.key(job, outlook)


def sent(decisions: list[Decision]) -> list[str]:
    return [it.job.id for it in decisions if isinstance(it, Dispatch)]


@every_order
@pytest.mark.parametrize("queued", [200, 2000])
def test_a_decision_asks_for_no_more_keys_in_a_longer_queue(name: str, queued: int) -> None:
    order = Counting(EVERY[name]())
    core = Core(Rules(order=order), [prefill(chunk_tokens=100), decode()])
    running = "0"
    for each in range(queued):
        core.handle([Arrived(online(str(each), 150 + each, each, give_up_us=10**12))], each)
    for turn in range(60):
        order.asked = 0
        running = sent(core.handle([PrefillDone(running)], queued + turn * SECOND // 4))[0]
        assert order.asked <= TURN_JOBS + 2 * HEADS


def served_after(core: Core, running: list[str]) -> list[str]:
    """Until nobody is left, one prompt a second."""
    served: list[str] = []
    while running:
        served.append(running.pop(0))
        running += sent(core.handle([PrefillDone(served[-1])], 50 + len(served) * SECOND))
    return served


FIFTY = [online(str(it), 1 + it * 37 % 400, it, give_up_us=10**12) for it in range(50)]


@every_order
def test_work_is_never_left_lying_while_a_server_is_free(name: str) -> None:
    core = Core(Rules(order=EVERY[name]()), [prefill(chunk_tokens=100), decode()])
    running = sent(core.handle([Arrived(job) for job in FIFTY], 50))
    assert sorted(served_after(core, running)) == sorted(job.id for job in FIFTY)


@every_order
@pytest.mark.parametrize("before", sorted(EVERY))
def test_a_reload_takes_all_that_wait_into_the_new_order(name: str, before: str) -> None:
    """So few that every order is exact."""
    jobs, found = FIFTY[: TURN_JOBS + 1], []
    for first in (before, name):
        core = Core(Rules(order=EVERY[first]()), [prefill(chunk_tokens=1), decode()])
        running = sent(core.handle([Arrived(jobs[0])], 50))
        core.handle([Arrived(job) for job in jobs[1:]], 50)
        core.adopt(Rules(order=EVERY[name]()))
        found.append(served_after(core, running))
    assert found[0] == found[1]
    assert len(set(found[0])) == len(jobs)


# Starvation: for each order, who that came later may still go before a job that has waited.

May = Callable[[Job, Job, Outlook], bool]
BOUNDS: dict[str, May] = {
    "fcfs": lambda job, later, now: False,
    "edf": lambda job, later, now: later.arrival_us < job.deadline_us,
    "shortest": lambda job, later, now: later.prompt_tokens < job.prompt_tokens,
    "hrrn": lambda job, later, now: later.prompt_tokens < job.prompt_tokens,
    "salvage": lambda job, later, now: (
        later.prompt_tokens < job.prompt_tokens
        or now.now_us - job.arrival_us <= 5 * (job.deadline_us - job.arrival_us)
    ),
    "srpf-oracle": lambda job, later, now: (
        later.prompt_tokens + answer_left(later) < job.prompt_tokens + answer_left(job)
    ),
    "kairos": lambda job, later, now: True,
}


def test_every_order_states_its_bound() -> None:
    assert BOUNDS.keys() == EVERY.keys()


@every_order
@given(
    tokens=st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)),
    later_us=st.integers(1, 100 * SECOND),
    waits_us=st.integers(0, 100 * SECOND),
    outlook=OUTLOOKS,
)
def test_nobody_overtakes_beyond_the_bound(
    name: str, tokens: tuple[int, int], later_us: int, waits_us: int, outlook: Outlook
) -> None:
    job, later = online("a", tokens[0]), online("b", tokens[1], later_us)
    now = outlook._replace(now_us=later_us + waits_us)
    order = EVERY[name]()
    overtakes = order.key(later, now.behind(tokens[0])) < order.key(job, now)
    assert not overtakes or BOUNDS[name](job, later, now)
