"""The contract of every rule that holds prompts back: a new one is held to it by its name."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import Core, Rules
from policies.breaker import Breaker, BreakerRule
from policies.events import Arrived, Dispatch, Finished, FirstToken, PrefillDone, Progress, Wakeup
from policies.hold import HOLD_TARGETS, ForSlack, held_until_us
from policies.ledger import Ledger
from policies.order import Fcfs
from policies.paces import ENOUGH, Contexts, PaceLine, fitted
from policies.registry import HOLD
from policies.types import Job
from tests.gateway.talk import SECOND, Talk, decode, offline, online, prefill, unified

every_hold = pytest.mark.parametrize("name", sorted(HOLD))


@dataclasses.dataclass(slots=True)
class Answer:
    booked_context: int
    generated: int = 101
    first_us: int = SECOND
    grown_us: int = 6 * SECOND
    tpot_us: int = 50_000


ANSWERS = st.builds(
    Answer,
    booked_context=st.integers(1, 130_000),
    generated=st.integers(0, 4000),
    first_us=st.integers(0, 9 * SECOND),
    grown_us=st.integers(0, 200 * SECOND),
    tpot_us=st.sampled_from([0, 20_000, 50_000]),
)
JOBS = st.builds(
    online,
    st.just("new"),
    tokens=st.integers(1, 130_000),
    at_us=st.integers(0, 10 * SECOND),
    give_up_us=st.integers(10 * SECOND, 10**12),
    deadline_us=st.integers(10 * SECOND, 40 * SECOND),
)


LINE = PaceLine(10_000, 0.0, 0.4)


def taught(*answers: Answer) -> Ledger:
    """A server that has been seen to step by its longest context."""
    books = Ledger(decode(), Breaker(BreakerRule()))
    watched = Answer(100, generated=1, grown_us=SECOND)
    contexts = [100 + 900 * number % 40_000 for number in range(ENOUGH + 4)]
    books.paces.told(watched, [watched], SECOND)
    now_us = SECOND
    for number, tokens in enumerate(contexts):
        other = Answer(tokens * (1 + number % 3))
        step_us = LINE.step_us(Contexts.of([watched, other]))
        now_us += round(100 * step_us)
        watched.generated += 100
        books.paces.told(watched, [watched, other], now_us)
    books.paces.left(watched)
    for number, answer in enumerate(answers):
        books.add_decode(answer.booked_context, answer.booked_context)
        books.running[str(number)] = answer
    return books


def held(job: Job, books: Ledger, *, first_us: float = 0.0, at_us: int = 7 * SECOND) -> bool:
    job = job._replace(give_up_us=10**12)
    return not ForSlack().bears(job, books, first_us, at_us)


@every_hold
@given(job=JOBS, answers=st.lists(ANSWERS, max_size=6), now_us=st.integers(0, 200 * SECOND))
def test_the_same_question_has_the_same_answer_and_changes_nothing(
    name: str, job: Job, answers: list[Answer], now_us: int
) -> None:
    books = taught(*answers)
    first = HOLD[name]().bears(job, books, now_us, now_us)
    assert HOLD[name]().bears(job, books, now_us, now_us) is first
    assert list(books.running.values()) == answers


@every_hold
def test_a_rule_has_no_state(name: str) -> None:
    assert HOLD[name]() == HOLD[name]()
    assert not hasattr(HOLD[name](), "__dict__")


@every_hold
@given(job=JOBS, now_us=st.integers(0, 200 * SECOND))
def test_nothing_is_held_where_nobody_runs(name: str, job: Job, now_us: int) -> None:
    assert HOLD[name]().bears(job, taught(), now_us, now_us)


@every_hold
@given(job=JOBS, answers=st.lists(ANSWERS, max_size=6))
def test_nobody_is_held_beyond_the_bound(name: str, job: Job, answers: list[Answer]) -> None:
    until_us = held_until_us(job)
    assert HOLD[name]().bears(job, taught(*answers), until_us, until_us)
    assert until_us <= job.arrival_us + HOLD_TARGETS * max(1, job.deadline_us - job.arrival_us)
    assert until_us <= max(job.give_up_us, job.arrival_us)


@every_hold
@given(answers=st.lists(ANSWERS, max_size=6))
def test_offline_work_and_unified_servers_are_left_to_others(
    name: str, answers: list[Answer]
) -> None:
    books = taught(*answers)
    assert HOLD[name]().bears(offline("b", 100_000), books, 0.0, SECOND)
    books.worker = unified()
    assert HOLD[name]().bears(online("a", 100_000), books, 0.0, SECOND)


def chatter(core: Core, ids: list[str], second: int) -> list[str]:
    """A second of tokens for all that run."""
    tokens = tuple((each, 20 * second) for each in ids)
    decisions = core.handle([Progress(tokens), Wakeup()], second * SECOND)
    return [it.job.id for it in decisions if isinstance(it, Dispatch)]


@every_hold
def test_all_that_wait_go_in_the_end_and_ties_go_by_the_id(name: str) -> None:
    core = Core(Rules(order=Fcfs(), hold=HOLD[name]()), [prefill(chunk_tokens=300_000), decode()])
    went: list[str] = []
    for each in ("a", "b", "c", "d", "e", "f"):
        job = online(each, 9_000, give_up_us=10**12, max_tokens=4000, tpot_us=1)
        went += [it.job.id for it in core.handle([Arrived(job)], 0) if isinstance(it, Dispatch)]
        core.handle([PrefillDone(each), FirstToken(each)], 0)
    for second in range(1, 60):
        went += chatter(core, ["a"], second)
    assert went == ["a", "b", "c", "d", "e", "f"]


# Each by its own promise.


def test_what_those_that_run_cannot_bear_is_held() -> None:
    books = taught(Answer(1_000), Answer(2_000))
    assert held(online("late", 120_000), books, first_us=9 * SECOND)
    assert not held(online("short", 5_000), books, first_us=9 * SECOND)


def test_those_that_are_late_already_are_not_asked() -> None:
    late = Answer(1_000, generated=50)
    assert not held(online("a", 120_000), taught(late, late), first_us=9 * SECOND)


def test_what_an_answer_has_in_hand_is_spent() -> None:
    """Of 45 seconds it has used 5, so the 512 tokens to come may take 78 ms more each."""
    ahead = Answer(1_000, generated=901)
    assert not held(online("a", 120_000), taught(ahead, ahead), first_us=9 * SECOND)


def test_a_job_that_keeps_both_its_targets_counts_for_one() -> None:
    tight = Answer(1_000, tpot_us=20_000, generated=251)
    job = online("a", 60_000, tpot_us=50_000)
    assert not held(job, taught(tight))
    assert held(job, taught(tight), first_us=9 * SECOND)
    assert held(job, taught(tight, tight))


def test_without_any_prediction_nothing_is_held() -> None:
    books = Ledger(decode(), Breaker(BreakerRule()))
    books.add_decode(100, 100)
    books.running["0"] = Answer(100, tpot_us=1)
    assert not held(online("a", 120_000), books)


def test_a_part_of_a_prompt_is_never_held() -> None:
    assert not held(online("a", 120_000, max_tokens=1), taught(Answer(1), Answer(1)), first_us=1e9)


@given(
    line=st.builds(
        PaceLine, st.floats(1e3, 5e4), st.just(0.0) | st.floats(0.01, 1), st.floats(0.01, 1)
    ),
    seed=st.integers(),
)
def test_the_line_is_learnt_from_what_is_seen(line: PaceLine, seed: int) -> None:
    draw = Random(seed).randint
    samples = []
    for _ in range(60):
        longest = draw(10, 60_000)
        held_there = Contexts(9, longest + draw(0, 200_000), longest)
        samples.append((held_there, line.step_us(held_there)))
    found = fitted(samples)
    assert found is not None
    probe = Contexts(9, 150_000, 50_000)
    assert found.step_us(probe) == pytest.approx(line.step_us(probe), rel=0.01)


def test_the_long_one_waits_behind_those_that_run_while_short_ones_pass() -> None:
    talk = Talk(
        [prefill(chunk_tokens=8_192), decode()],
        Rules(order=Fcfs(), hold=ForSlack()),
    )
    books = talk.core.ledgers["d"]
    books.paces = taught().paces
    for each in ("a", "b"):
        assert talk.arrive(online(each, 1_000, max_tokens=4000)) == [("go", each, "p", "d")]
        talk.say(PrefillDone(each), FirstToken(each))
    long = online("long", 120_000, deadline_us=1, give_up_us=60 * SECOND)
    assert talk.arrive(long) == []
    assert talk.arrive(online("c", 1_000)) == [("go", "c", "p", "d")]
    talk.say(PrefillDone("c"), FirstToken("c"))
    gone = [talk.say(Finished(each, 10), at_us=1) for each in ("a", "b", "c")]
    assert gone[-1] == [("go", "long", "p", "d")]
