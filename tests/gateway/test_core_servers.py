"""Conversations with the core: servers come, go, drain, fall silent and report."""

from __future__ import annotations

from dataclasses import replace

from gateway.core import Rules
from policies.events import (
    Finished,
    LoadReport,
    PrefillDone,
    Wakeup,
    WorkerDown,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from policies.types import Kind, Pool
from tests.gateway.talk import (
    LATENCY,
    SECOND,
    Talk,
    broke,
    decode,
    load,
    offline,
    one_at_a_time,
    online,
    pair,
    prefill,
    unified,
)


def test_offline_work_waits_for_a_server_that_is_down() -> None:
    talk = Talk(pair())
    talk.say(WorkerDown("d"))
    assert talk.arrive(offline("a"), online("b")) == [("reject", "b", "workers_unavailable")]
    assert talk.say(WorkerUp(decode())) == [("go", "a", "p", "d")]


def test_a_new_server_takes_what_waits() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    assert talk.say(WorkerUp(decode("d2"))) == [("go", "b", "p", "d2")]


def test_a_draining_server_ends_what_it_has_and_gets_nothing() -> None:
    talk = Talk([prefill(), decode("d1"), decode("d2")])
    talk.arrive(online("a"))
    talk.say(WorkerDraining("d1"))
    assert talk.arrive(online("b")) == [("go", "b", "p", "d2")]
    assert talk.say(Finished("a", 1)) == []
    assert talk.core.ledgers["d1"].is_empty


def test_a_missed_probe_does_not_end_the_draining() -> None:
    talk = Talk(pair())
    talk.say(WorkerDraining("d"), WorkerDown("d"), WorkerUp(decode()))
    assert talk.arrive(online("a")) == [("reject", "a", "workers_unavailable")]


def test_a_draining_server_that_is_announced_again_is_back() -> None:
    talk = Talk(pair())
    talk.say(WorkerDraining("d"))
    talk.arrive(offline("a"))
    assert talk.say(WorkerUp(decode())) == [("go", "a", "p", "d")]


def test_a_draining_server_that_is_wanted_back_takes_what_waits() -> None:
    talk = Talk(pair())
    talk.say(WorkerDraining("d"))
    talk.arrive(offline("a"))
    assert talk.say(WorkerDraining("d", draining=False)) == [("go", "a", "p", "d")]


def test_when_the_last_server_is_taken_off_what_waits_is_told_so() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"), offline("c"))
    assert talk.say(WorkerGone("d")) == [
        ("reject", "b", "no_worker"),
        ("reject", "c", "no_worker"),
    ]


def test_a_retry_without_a_server_on_the_list_is_told_so() -> None:
    talk = Talk(pair())
    talk.arrive(online("a"), offline("b"))
    talk.say(WorkerGone("d"))
    assert talk.say(broke("a", "d")) == [("reject", "a", "no_worker")]
    talk.say(broke("b", "d"))
    assert talk.sleep() == [("reject", "b", "no_worker")]


def test_a_server_that_is_replaced_in_one_instant_turns_nobody_away() -> None:
    """A reload that changes a server takes it off and puts it on again."""
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    replaced = talk.say(WorkerGone("d"), WorkerUp(decode(max_running=2)))
    assert replaced == [("go", "b", "p", "d")]


def test_a_server_that_comes_back_still_has_its_work_in_the_books() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"))
    talk.say(WorkerGone("d"))
    talk.say(WorkerUp(decode(max_running=1)))
    assert talk.arrive(online("b")) == []
    assert talk.say(Finished("a", 1)) == [("go", "b", "p", "d")]
    assert talk.core.ledgers["d"].decodes == 1


def test_another_server_of_the_same_name_begins_with_empty_books() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"))
    talk.say(WorkerGone("d"))
    talk.say(WorkerUp(replace(decode(max_running=1), url="http://elsewhere")))
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]
    talk.say(Finished("a", 1))
    assert talk.core.ledgers["d"].decodes == 1


def test_a_job_for_a_server_that_is_away_blocks_no_smaller_one() -> None:
    talk = Talk([prefill(), decode("large", kv_tokens=9000), decode("small", kv_tokens=500)])
    talk.say(WorkerDown("large"))
    assert talk.arrive(offline("a", 5000), offline("b", 100)) == [("go", "b", "p", "small")]
    assert talk.core.queued(Kind.OFFLINE) == 1
    assert talk.say(WorkerUp(decode("large", kv_tokens=9000))) == [("go", "a", "p", "large")]


def test_a_job_set_aside_still_has_its_deadline() -> None:
    talk = Talk([prefill(), decode("large", kv_tokens=9000), decode("small", kv_tokens=500)])
    talk.say(WorkerDown("large"))
    talk.arrive(offline("a", 5000))
    assert talk.sleep() == [("reject", "a", "deadline_passed")]


def test_online_work_that_only_a_missing_server_could_hold_is_refused() -> None:
    talk = Talk([prefill(), decode("large", kv_tokens=9000), decode("small", kv_tokens=500)])
    talk.say(WorkerDown("large"))
    assert talk.arrive(online("a", 5000)) == [("reject", "a", "workers_unavailable")]


def test_a_report_that_raises_the_capacity_frees_what_was_set_aside() -> None:
    talk = Talk([prefill(), decode("large", kv_tokens=9000), decode("small")])
    talk.say(LoadReport("small", load(capacity_tokens=500)), WorkerDown("large"))
    assert talk.arrive(offline("a", 5000)) == []
    grown = LoadReport("small", load(capacity_tokens=9000))
    assert talk.say(grown) == [("go", "a", "p", "small")]


def test_capacity_comes_from_the_server_unless_the_operator_said_less() -> None:
    talk = Talk([unified("u", kv_tokens=1000), unified("v")])
    report = load(capacity_tokens=5000, max_running=7)
    talk.say(LoadReport("u", report), LoadReport("v", report))
    ledgers = talk.core.ledgers
    assert (ledgers["u"].kv_tokens, ledgers["v"].kv_tokens) == (1000, 5000)
    assert ledgers["v"].max_running == 7


def test_one_high_report_is_not_believed() -> None:
    """It lags: what was sent a moment ago may be in it and in the books."""
    talk = Talk(pair(kv_tokens=1000))
    talk.arrive(online("a"))
    talk.say(LoadReport("d", load(900)))
    assert talk.core.ledgers["d"].foreign_tokens == 0
    talk.say(LoadReport("d", load(700)))
    assert talk.core.ledgers["d"].foreign_tokens == 600


def test_what_the_gateway_sent_itself_is_not_foreign() -> None:
    talk = Talk(pair())
    talk.arrive(online("a", 500))
    talk.say(LoadReport("d", load(500)), LoadReport("d", load(500)))
    assert talk.core.ledgers["d"].foreign_tokens == 0


def crowded(seen_us: int = 0) -> list[LoadReport]:
    return [LoadReport("d", load(900, seen_us))] * 2


def test_a_silent_server_is_believed_empty_of_others_in_the_end() -> None:
    talk = Talk(pair(kv_tokens=1000), Rules(load_stale_us=2 * SECOND))
    talk.say(*crowded())
    talk.arrive(offline("a"), offline("b", 200))
    assert talk.core.queued(Kind.OFFLINE) == 1
    assert talk.sleep() == [("go", "b", "p", "d")]
    assert talk.now_us == 2 * SECOND


def test_an_old_report_is_not_held_against_a_new_job() -> None:
    talk = Talk(pair(kv_tokens=1000), Rules(load_stale_us=2 * SECOND))
    talk.say(*crowded())
    talk.arrive(online("a", 10))
    assert talk.arrive(online("b", 10), at_us=3 * SECOND) == [("go", "b", "p", "d")]


def test_reports_that_keep_coming_stay_believed() -> None:
    talk = Talk(pair(kv_tokens=1000), Rules(load_stale_us=2 * SECOND))
    talk.arrive(online("a", 10))
    for second in range(5):
        talk.say(*crowded(second * SECOND), at_us=second * SECOND)
    assert talk.arrive(offline("b", 200)) == []


def test_a_server_that_goes_down_takes_its_report_along() -> None:
    talk = Talk(pair())
    talk.say(*crowded(), WorkerDown("d"))
    assert talk.core.ledgers["d"].foreign_tokens == 0


def test_messages_about_unknown_servers_change_nothing() -> None:
    talk = Talk(pair())
    assert talk.say(WorkerDown("x"), WorkerDraining("x"), WorkerGone("x")) == []
    assert talk.say(LoadReport("x", load())) == []
    assert set(talk.core.ledgers) == {"p", "d"}


def test_a_server_at_another_address_starts_with_a_closed_breaker() -> None:
    talk = Talk(pair())
    for i in range(3):
        talk.arrive(offline(f"j{i}"))
        talk.say(broke(f"j{i}", "d"))
    assert not talk.core.ledgers["d"].breaker.is_closed
    talk.say(WorkerUp(replace(decode(), url="http://elsewhere")))
    assert talk.core.ledgers["d"].breaker.is_closed


def test_a_server_may_come_back_in_another_role() -> None:
    talk = Talk([unified("u")])
    talk.say(WorkerUp(prefill("u")))
    assert talk.arrive(online("a")) == [("reject", "a", "no_worker")]
    talk.say(WorkerUp(decode("d")))
    assert talk.arrive(online("b")) == [("go", "b", "u", "d")]


def test_an_alarm_is_asked_for_once() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"))
    for i in range(50):
        talk.arrive(online(f"b{i}", at_us=i), at_us=i)
        talk.say(PrefillDone("nobody"))
    assert talk.alarms == [10 * SECOND]


def test_an_earlier_deadline_moves_the_alarm_forward() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    talk.arrive(online("c", give_up_us=SECOND))
    assert talk.alarms == [10 * SECOND, SECOND]
    assert talk.sleep() == [("reject", "c", "deadline_passed")]
    assert talk.alarms[-1] == 10 * SECOND


def test_an_alarm_that_nobody_needs_any_more_is_answered_with_nothing() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    talk.say(Finished("a", 1))
    talk.say(Finished("b", 1))
    assert (talk.say(Wakeup(), at_us=talk.alarms[-1]), len(talk.alarms)) == ([], 1)


def test_a_whole_answer_of_a_unified_server_is_no_prompt_any_more_once_nothing_waits() -> None:
    talk = Talk([unified(chunk_tokens=100)])
    assert talk.arrive(online("a", 150), online("b", 150))[0] == ("go", "a", "u")
    report = LoadReport("u", load(160, seen_us=SECOND))
    assert talk.say(report, at_us=SECOND) == [("go", "b", "u")]
    assert talk.core.ledgers["u"].prefill_tokens == 150


def test_a_pool_of_which_nobody_is_in_rotation_borrows_from_the_other() -> None:
    strict, relaxed = decode("strict"), decode("relaxed", pool=Pool.RELAXED)
    talk = Talk([prefill(), strict, relaxed], LATENCY)
    assert talk.arrive(online("a")) == [("go", "a", "p", "strict")]
    talk.say(WorkerDown("strict"))
    assert talk.arrive(online("b")) == [("go", "b", "p", "relaxed")]
    talk.say(WorkerUp(strict))
    assert talk.arrive(online("c")) == [("go", "c", "p", "strict")]
