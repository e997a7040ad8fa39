"""Conversations with the core: attempts fail, servers are left alone and tried again."""

from __future__ import annotations

import pytest

from gateway.core import Rules
from policies.breaker import BreakerRule
from policies.events import (
    Arrived,
    Dispatch,
    Fault,
    Finished,
    FirstToken,
    Freed,
    Left,
    PrefillDone,
    Reject,
    Wakeup,
    WorkerDown,
)
from policies.order import Fcfs
from policies.retry import RetryRule
from tests.gateway.talk import (
    PATIENCE_US,
    SECOND,
    WINDOW_US,
    Talk,
    broke,
    decode,
    offline,
    one_at_a_time,
    online,
    pair,
    prefill,
    unified,
)

ONE_STRIKE = Rules(
    order=Fcfs(),
    breaker=BreakerRule(failures=1, cooldown_us=SECOND, cooldown_max_us=4 * SECOND),
    retry=RetryRule(online_attempts=9, backoff_us=10),
)


def test_an_online_job_goes_again_at_once() -> None:
    talk = Talk(pair())
    talk.arrive(online("a"))
    assert talk.say(broke("a", "d")) == [("go", "a", "p", "d", "retry")]


def test_an_offline_job_waits_longer_each_time() -> None:
    talk = Talk(pair())
    talk.arrive(offline("a"))
    pauses = []
    for _ in range(4):
        assert talk.say(broke("a")) == []
        failed_us = talk.now_us
        assert talk.sleep() == [("go", "a", "p", "d", "retry")]
        pauses.append(talk.now_us - failed_us)
    assert pauses == [250_000, 500_000, 1_000_000, 2_000_000]


def test_a_retry_avoids_the_server_that_failed() -> None:
    talk = Talk([prefill("p1"), prefill("p2"), decode("d1"), decode("d2")])
    talk.arrive(online("a"))
    assert talk.say(broke("a", "p1", "d1")) == [("go", "a", "p2", "d2", "retry")]


def test_a_retry_prefers_a_pair_to_the_unified_server_that_failed() -> None:
    talk = Talk([prefill("x"), decode("d"), unified("u")])
    assert talk.arrive(online("a")) == [("go", "a", "u")]
    assert talk.say(broke("a", "u")) == [("go", "a", "x", "d", "retry")]


def test_a_failed_server_is_tried_again_when_no_other_could_ever_hold_the_job() -> None:
    talk = Talk([prefill(), decode("large", kv_tokens=9000), decode("small", kv_tokens=100)])
    talk.arrive(online("a", 500))
    assert talk.say(broke("a", "large")) == [("go", "a", "p", "large", "retry")]


def test_a_retry_waits_for_another_server_rather_than_fail_at_the_same() -> None:
    talk = Talk([prefill(), decode("d1", max_running=1), decode("d2", max_running=1)])
    talk.arrive(online("a"), online("b"))
    assert talk.say(broke("a", "d1")) == []
    assert talk.say(Finished("b", 1)) == [("go", "a", "p", "d2", "retry")]


def test_attempts_are_counted() -> None:
    talk = Talk(pair())
    talk.arrive(online("a"))
    assert [talk.say(broke("a"))[0][0] for _ in range(3)] == ["go", "go", "fail"]
    assert len(talk.core) == 0


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (broke("a", fault=Fault.REQUEST), "bad_request"),
        (broke("a", "d", restartable=False), "not_resumable"),
    ],
)
def test_some_failures_are_final(failure: object, reason: str) -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    decisions = talk.say(failure)  # type: ignore[arg-type]  # parametrize widens it
    assert decisions == [("fail", "a", reason), ("go", "b", "p", "d")]


def test_a_failure_after_the_deadline_is_final() -> None:
    talk = Talk(pair())
    talk.arrive(online("a"))
    assert talk.say(broke("a"), at_us=PATIENCE_US) == [("fail", "a", "deadline_passed")]


def test_online_retries_have_a_budget() -> None:
    talk = Talk(pair(), Rules(retry=RetryRule(burst_tokens=150, share=0.1)))
    talk.arrive(online("a"), online("b"))
    assert talk.say(broke("a")) == [("go", "a", "p", "d", "retry")]
    assert talk.say(broke("b")) == [("fail", "b", "retry_budget_spent")]


def test_fresh_work_earns_retries() -> None:
    talk = Talk(pair(), Rules(retry=RetryRule(burst_tokens=100, share=0.5)))
    talk.arrive(online("a"))
    talk.say(broke("a"))
    talk.arrive(online("b", 200))
    assert talk.say(broke("a")) == [("go", "a", "p", "d", "retry")]


def test_a_refused_job_earns_nothing() -> None:
    talk = Talk(one_at_a_time(), Rules(max_queued=1, retry=RetryRule(burst_tokens=1000)))
    talk.arrive(online("a", 500), online("b"))
    talk.say(broke("a"))
    left = talk.core.retry_budget_tokens
    assert talk.arrive(offline("c"), offline("d", 900)) == [("reject", "d", "queue_full")]
    assert talk.core.retry_budget_tokens == left + 20


def test_offline_failures_do_not_spend_what_online_needs() -> None:
    talk = Talk(pair(), Rules(retry=RetryRule(burst_tokens=100)))
    talk.arrive(offline("a", 100), online("b", 100))
    talk.say(broke("a"))
    assert talk.say(broke("b")) == [("go", "b", "p", "d", "retry")]


def test_a_resume_carries_what_was_generated() -> None:
    talk = Talk(pair())
    talk.arrive(online("a", 100, max_tokens=50))
    talk.say(FirstToken("a"))
    dispatch = talk.core.handle([broke("a", "d", generated=20)], 5)[0]
    assert isinstance(dispatch, Dispatch)
    assert (dispatch.job.prompt_tokens, dispatch.job.max_tokens) == (120, 30)
    assert dispatch.reason == "resume"


def test_a_stream_is_resumed_however_long_it_has_run() -> None:
    """Its patience was for the first token, and that came."""
    talk = Talk(pair())
    talk.arrive(online("a"))
    talk.say(FirstToken("a"))
    late_us = 50 * PATIENCE_US
    resumed = talk.say(broke("a", "d", generated=9), at_us=late_us)
    assert resumed == [("go", "a", "p", "d", "resume")]


def test_a_resumed_stream_waits_for_its_target_once_more() -> None:
    talk = Talk(pair())
    talk.arrive(online("a"))
    talk.say(FirstToken("a"))
    talk.say(WorkerDown("d"), broke("a", "d", generated=9), at_us=50 * SECOND)
    assert talk.sleep() == [("reject", "a", "deadline_passed")]
    assert talk.now_us == 52 * SECOND


def test_a_resumed_job_that_has_outgrown_every_server_blocks_nobody() -> None:
    talk = Talk(pair(kv_tokens=1000))
    talk.arrive(offline("a", 900), offline("b", 100))
    talk.say(FirstToken("a"))
    talk.say(broke("a", generated=150))
    assert talk.say(Finished("b", 1)) == []
    assert talk.sleep() == [("reject", "a", "request_too_large")]


def test_waiting_for_another_attempt_has_an_end() -> None:
    talk = Talk(pair(), Rules(retry=RetryRule(backoff_us=2 * WINDOW_US, backoff_max_us=2**60)))
    talk.arrive(offline("a"))
    talk.say(broke("a"))
    assert talk.sleep() == [("reject", "a", "deadline_passed")]
    assert (talk.now_us, len(talk.core)) == (WINDOW_US, 0)


def test_a_client_may_leave_between_two_attempts() -> None:
    talk = Talk(pair())
    talk.arrive(offline("a"))
    talk.say(broke("a"))
    assert talk.say(Left("a")) == []
    assert (talk.sleep(), len(talk.core)) == ([], 0)


def test_failures_in_a_row_open_the_breaker() -> None:
    talk = Talk(pair())
    talk.arrive(*(online(name) for name in "abc"))
    assert talk.say(broke("a", "d"), broke("b", "d")) == [
        ("go", "a", "p", "d", "retry"),
        ("go", "b", "p", "d", "retry"),
    ]
    assert talk.say(broke("c", "d")) == []
    assert talk.arrive(online("x")) == [("reject", "x", "workers_unavailable")]


def test_a_success_between_two_failures_forgets_the_first() -> None:
    talk = Talk(pair(), Rules(breaker=BreakerRule(failures=2)))
    for i in range(4):
        talk.arrive(online(f"bad{i}"), online(f"good{i}"))
        talk.say(broke(f"bad{i}", "p", fault=Fault.BUSY), Left(f"bad{i}"))
        talk.say(PrefillDone(f"good{i}"), FirstToken(f"good{i}"), Finished(f"good{i}", 1))
    assert talk.core.ledgers["p"].breaker.is_closed


def open_breaker(talk: Talk, name: str = "d") -> None:
    talk.arrive(offline("victim"))
    talk.say(broke("victim", name))
    talk.say(Left("victim"))


def test_a_refusal_says_when_the_breaker_lets_somebody_try() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    reject = talk.core.handle([Arrived(online("a"))], 400_000)[0]
    assert isinstance(reject, Reject)
    assert reject.retry_after_us == 600_000


def test_an_offline_job_alone_tries_the_server_again_when_the_pause_is_over() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    assert talk.arrive(offline("a"), offline("b")) == []
    assert talk.sleep() == [("go", "a", "p", "d")]
    assert talk.now_us == SECOND


@pytest.mark.parametrize("end", [FirstToken("a"), Finished("a", 1)])
def test_one_success_lets_everybody_in(end: FirstToken | Finished) -> None:
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    talk.arrive(offline("a"), offline("b"), offline("c"))
    talk.sleep()
    talk.say(PrefillDone("a"))
    assert talk.say(end) == [("go", "b", "p", "d"), ("go", "c", "p", "d")]


def test_a_trial_that_fails_doubles_the_pause_up_to_a_limit() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    talk.arrive(offline("a"))
    pauses = []
    for _ in range(4):
        failed_us = talk.now_us
        assert talk.sleep()
        pauses.append((talk.now_us - failed_us) // SECOND)
        talk.say(broke("a", "d"))
    assert pauses == [1, 2, 4, 4]


def test_a_cancelled_trial_gives_its_place_to_the_next() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    talk.arrive(offline("a"), offline("b"))
    talk.sleep()
    talk.say(Left("a"))
    assert talk.say(Freed("a")) == [("go", "b", "p", "d")]


def test_an_old_job_that_ends_does_not_admit_a_second_trial() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    talk.arrive(online("old"))
    open_breaker(talk)
    talk.arrive(offline("a"), offline("b"))
    assert talk.sleep() == [("go", "a", "p", "d")]
    talk.say(Left("old"))
    assert talk.say(Freed("old")) == []


def test_a_job_whose_trial_had_its_verdict_does_not_admit_a_second_trial_later() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    talk.arrive(offline("a"))
    talk.sleep()
    talk.say(PrefillDone("a"), FirstToken("a"))
    open_breaker(talk)
    talk.arrive(offline("b"), offline("c"))
    assert talk.sleep() == [("go", "b", "p", "d")]
    talk.say(Left("a"))
    assert talk.say(Freed("a")) == []


def test_an_event_at_the_time_of_the_alarm_does_not_swallow_it() -> None:
    """The driver moves its one timer whenever it is told to: what was due must be done then."""
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    talk.arrive(offline("a"))
    talk.say(Wakeup(), at_us=talk.alarms[-1])
    assert talk.alarms[-1] == SECOND
    assert talk.say(Freed("nobody"), at_us=talk.alarms[-1]) == [("go", "a", "p", "d")]


def test_both_sides_of_a_pair_may_be_blamed() -> None:
    talk = Talk([prefill("p1"), prefill("p2"), decode("d1"), decode("d2")], ONE_STRIKE)
    talk.arrive(online("a"))
    talk.say(broke("a", "p1", "d1", fault=Fault.PAIRING))
    closed = {name for name, e in talk.core.ledgers.items() if e.breaker.is_closed}
    assert closed == {"p2", "d2"}


def test_nobody_is_blamed_for_a_bad_request() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    talk.arrive(online("a"))
    talk.say(broke("a", fault=Fault.REQUEST))
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]


def test_a_reload_changes_the_breakers_that_are_there() -> None:
    talk = Talk(pair())
    talk.core.adopt(ONE_STRIKE)
    open_breaker(talk)
    assert not talk.core.ledgers["d"].breaker.is_closed


def test_an_open_breaker_wakes_nobody_when_nobody_waits() -> None:
    talk = Talk(pair(), ONE_STRIKE)
    open_breaker(talk)
    talk.alarms.clear()
    talk.say(Wakeup(), at_us=SECOND)
    assert talk.alarms == []
