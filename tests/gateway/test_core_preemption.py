"""A job is taken off its servers and goes on later, whatever else happens to it meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core import Rules
from policies.events import (
    Dispatch,
    Event,
    Fault,
    Finished,
    FirstToken,
    Freed,
    Left,
    Preempted,
    PrefillDone,
    Progress,
    Recall,
    WorkerGone,
)
from policies.order import Fcfs
from policies.retry import RetryRule
from policies.types import Job, Resume
from tests.gateway.talk import Talk, broke, offline, one_at_a_time, online, pair

BEGAN = (PrefillDone("a"), FirstToken("a"), Progress((("a", 7),)))
WAYS = {"while it prefills": (), "while it decodes": BEGAN}
GO = ("go", "a", "p", "d")
PREEMPT = ("preempt", "a", "recalled")


def running(*since: Event, rules: Rules | None = None, max_running: int = 0, **fields: Any) -> Talk:
    talk = Talk(pair(max_running=max_running), rules or Rules(order=Fcfs()))
    assert talk.arrive(offline("a", **fields)) == [GO]
    talk.say(*since)
    return talk


def books(talk: Talk) -> list[tuple[int, ...]]:
    return [
        (e.prefills, e.prefill_tokens, e.decodes, e.context_tokens, e.reserved_tokens)
        for e in talk.core.ledgers.values()
    ]


def dispatched(talk: Talk, *events: Event) -> Job:
    """The job that goes after these events."""
    (go,) = (it for it in talk.core.handle(events, talk.now_us) if isinstance(it, Dispatch))
    return go.job


@pytest.mark.parametrize("way", WAYS)
def test_a_job_is_taken_off_and_goes_again(way: str) -> None:
    talk = running(*WAYS[way])
    assert talk.say(Recall("a")) == [PREEMPT]
    made = 7 if WAYS[way] else 0
    assert talk.say(Preempted("a", made)) == [(*GO, "resume" if made else "requeued")]
    assert talk.say(Finished("a", 9)) == []
    assert books(talk) == [(0, 0, 0, 0, 0)] * 2


def test_what_was_generated_is_prompt_from_then_on() -> None:
    talk = running(*BEGAN)
    talk.say(Recall("a"))
    job = dispatched(talk, Preempted("a", 7))
    assert (job.prompt_tokens, job.max_tokens) == (107, 93)


def test_it_keeps_its_place_and_its_window() -> None:
    talk = running(max_running=1)
    talk.arrive(offline("b", at_us=5))
    before = talk.core._tickets["a"].job
    talk.say(Recall("a"))
    after = dispatched(talk, Preempted("a"))
    assert (after.id, after.give_up_us, after.arrival_us) == ("a", before.give_up_us, 0)


def test_its_place_is_taken_until_its_legs_are_closed() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(offline("a"))
    assert talk.arrive(online("b")) == []
    assert talk.say(Recall("a")) == [PREEMPT]
    assert talk.say(Preempted("a")) == [("go", "b", "p", "d")]
    assert talk.say(PrefillDone("b"), Finished("b", 1)) == [(*GO, "requeued")]


def test_nobody_is_preempted_twice_at_once() -> None:
    talk = running()
    assert talk.say(Recall("a"), Recall("a")) == [PREEMPT]
    assert talk.say(Recall("a")) == []


def test_a_job_that_waits_or_that_nobody_knows_is_not_preempted() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(offline("a"), offline("b"))
    assert talk.say(Recall("b"), Recall("nobody")) == []


@pytest.mark.parametrize("resume", Resume)
@pytest.mark.parametrize("way", WAYS)
def test_a_client_who_has_seen_what_can_not_go_on_keeps_its_job(way: str, resume: Resume) -> None:
    talk = running(*WAYS[way], resume=resume)
    stays = resume is Resume.UNTIL_SHOWN and bool(WAYS[way])
    assert talk.say(Recall("a")) == ([] if stays else [PREEMPT])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("last", "said"),
    [
        (Finished("a", 9), []),
        (broke("a", "d"), [(*GO, "retry")]),
        (broke("a", "d", generated=7), [(*GO, "resume")]),
        (broke("a", fault=Fault.REQUEST), [("fail", "a", "bad_request")]),
        (broke("a", restartable=False), [("fail", "a", "not_resumable")]),
    ],
)
def test_an_end_that_comes_first_stands(way: str, last: Event, said: list[tuple[Any, ...]]) -> None:
    rules = Rules(order=Fcfs(), retry=RetryRule(backoff_us=0))
    talk = running(*WAYS[way], rules=rules)
    talk.say(Recall("a"))
    assert talk.say(last) == said
    assert talk.say(Preempted("a", 3)) == []
    assert len(talk.core) == (1 if said and said[0][0] == "go" else 0)


@pytest.mark.parametrize("last", [Preempted("a", 7), Freed("a"), Finished("a", 9), broke("a")])
@pytest.mark.parametrize("way", WAYS)
def test_a_client_may_leave_while_its_job_yields(way: str, last: Event) -> None:
    talk = running(*WAYS[way])
    talk.say(Recall("a"))
    assert talk.say(Left("a")) == [("cancel", "a", "client_left")]
    assert talk.say(last) == []
    assert talk.say(Preempted("a"), Freed("a"), Left("a")) == []
    assert (len(talk.core), books(talk)) == (0, [(0, 0, 0, 0, 0)] * 2)


def test_a_client_may_leave_in_the_instant_of_the_preemption() -> None:
    talk = running(*BEGAN)
    assert talk.say(Recall("a"), Left("a")) == [PREEMPT, ("cancel", "a", "client_left")]
    assert talk.say(Preempted("a"), Freed("a")) == []
    assert len(talk.core) == 0


def test_a_client_may_leave_before_its_job_goes_again() -> None:
    talk = running(*BEGAN, max_running=1)
    talk.arrive(online("b"))
    talk.say(Recall("a"), Preempted("a", 7))
    assert talk.say(Left("a")) == []
    assert len(talk.core) == 1


def test_late_words_of_a_yielding_attempt_change_nothing() -> None:
    talk = running()
    talk.say(Recall("a"))
    assert talk.say(*BEGAN) == []
    assert talk.say(Preempted("a", 7)) == [(*GO, "resume")]
    assert talk.say(*BEGAN, Finished("a", 9)) == []
    assert books(talk) == [(0, 0, 0, 0, 0)] * 2


def test_a_server_that_goes_while_its_job_yields_leaves_it_waiting() -> None:
    talk = running(*BEGAN)
    talk.say(Recall("a"), WorkerGone("d"))
    assert talk.say(Preempted("a", 7)) == [("reject", "a", "no_worker")]


def test_preemptions_are_no_attempts() -> None:
    rules = Rules(order=Fcfs(), retry=RetryRule(offline_attempts=2, backoff_us=0))
    talk = running(rules=rules)
    for _ in range(9):
        assert talk.say(Recall("a"), Preempted("a")) == [PREEMPT, (*GO, "requeued")]
    assert talk.say(broke("a")) == [(*GO, "retry")]
    assert talk.say(broke("a")) == [("fail", "a", "attempts_exhausted")]


def test_preemptions_cost_no_retry_budget_and_blame_nobody() -> None:
    talk = Talk(pair())
    talk.arrive(online("a"))
    before = talk.core.retry_budget_tokens
    talk.say(Recall("a"), Preempted("a"))
    assert talk.core.retry_budget_tokens == before
    assert all(e.breaker.is_closed for e in talk.core.ledgers.values())
