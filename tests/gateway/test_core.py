"""Conversations with the core: jobs come, wait, go and leave."""

from __future__ import annotations

import pytest

from gateway.core import Rules
from policies.admit import Headroom
from policies.events import (
    Arrived,
    Finished,
    FirstToken,
    Freed,
    Left,
    LoadReport,
    PrefillDone,
    Progress,
    Reason,
    Reject,
    Wakeup,
)
from policies.order import Edf, Fcfs
from policies.place import RoundRobin
from policies.types import Kind, Pool
from tests.gateway.talk import (
    LATENCY,
    PATIENCE_US,
    SECOND,
    WINDOW_US,
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


def test_a_job_goes_to_a_pair_at_once() -> None:
    talk = Talk(pair())
    assert talk.arrive(online("a")) == [("go", "a", "p", "d")]
    assert talk.alarms == []


def test_a_unified_server_is_both_legs() -> None:
    talk = Talk([unified()])
    assert talk.arrive(online("a")) == [("go", "a", "u")]
    assert (talk.core.ledgers["u"].prefills, talk.core.ledgers["u"].decodes) == (1, 1)


def test_the_next_goes_when_one_has_finished() -> None:
    talk = Talk(one_at_a_time())
    assert talk.arrive(online("a"), online("b")) == [("go", "a", "p", "d")]
    assert talk.say(PrefillDone("a")) == []
    assert talk.say(FirstToken("a"), Progress((("a", 5),))) == []
    assert talk.say(Finished("a", 9)) == [("go", "b", "p", "d")]


def test_an_event_of_an_unknown_job_changes_nothing() -> None:
    talk = Talk(pair())
    events = (PrefillDone("x"), FirstToken("x"), Progress((("x", 3),)), Finished("x", 1))
    assert talk.say(*events, Freed("x"), Left("x"), broke("x", "d"), Wakeup()) == []
    assert len(talk.core) == 0


def test_first_come_first_served_with_ties_by_id() -> None:
    talk = Talk(one_at_a_time(), Rules(order=Fcfs()))
    talk.arrive(online("busy"))
    talk.arrive(online("c", at_us=2), online("b", at_us=1), online("a", at_us=2), at_us=5)
    gone = [talk.say(Finished(name, 1)) for name in ("busy", "b", "a")]
    assert gone == [[("go", name, "p", "d")] for name in ("b", "a", "c")]


def test_the_earliest_deadline_goes_first() -> None:
    talk = Talk(one_at_a_time(), Rules(order=Edf()))
    talk.arrive(online("busy"))
    talk.arrive(online("slow"), online("urgent", deadline_us=SECOND))
    assert talk.say(Finished("busy", 1)) == [("go", "urgent", "p", "d")]


def test_online_goes_before_offline_that_came_earlier() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("busy"))
    talk.arrive(offline("batch"), at_us=1)
    talk.arrive(online("chat", at_us=2), at_us=2)
    assert talk.say(Finished("busy", 1)) == [("go", "chat", "p", "d")]
    assert talk.say(Finished("chat", 1)) == [("go", "batch", "p", "d")]


def test_offline_holds_back_while_online_waits_for_another_model_on_the_same_server() -> None:
    """The server serves any model, so a slot that offline takes is one that online lacks."""
    talk = Talk(pair(kv_tokens=1000))
    talk.arrive(online("busy", 600, model="x"))
    assert talk.arrive(online("big", 500, model="y")) == []
    assert talk.arrive(offline("small", 10, model="x")) == []
    assert talk.say(Finished("busy", 1)) == [
        ("go", "big", "p", "d"),
        ("go", "small", "p", "d"),
    ]


def test_models_do_not_wait_for_each_other() -> None:
    talk = Talk([unified("x", model="x", max_running=1), unified("y", model="y")])
    talk.arrive(online("a", model="x"))
    assert talk.arrive(online("b", model="x")) == []
    assert talk.arrive(online("c", model="y"), offline("d", model="y")) == [
        ("go", "c", "y"),
        ("go", "d", "y"),
    ]


def test_a_job_without_a_model_goes_anywhere() -> None:
    assert Talk([unified(model="x")]).arrive(online("a")) == [("go", "a", "u")]


def test_prompts_beyond_the_cap_wait_in_the_gateway() -> None:
    talk = Talk([prefill(chunk_tokens=1000), decode()])
    assert len(talk.arrive(*(online(f"j{i}", 500) for i in range(6)))) == 4
    assert talk.say(PrefillDone("j0")) == [("go", "j4", "p", "d")]


def test_without_a_chunk_size_the_cap_is_in_tokens() -> None:
    talk = Talk(pair(), Rules(admit=Headroom(prefill_cap_tokens=250)))
    assert len(talk.arrive(*(online(f"j{i}") for i in range(4)))) == 2


def test_a_prompt_longer_than_the_cap_goes_alone() -> None:
    talk = Talk([prefill(chunk_tokens=100), decode()])
    assert talk.arrive(online("long", 5000), online("next", 10)) == [("go", "long", "p", "d")]
    assert talk.say(PrefillDone("long")) == [("go", "next", "p", "d")]


def test_cached_tokens_are_not_work() -> None:
    talk = Talk([prefill(chunk_tokens=100), decode()])
    talk.arrive(online("a", 180))
    assert talk.arrive(online("b", 500, cached_tokens=490)) == [("go", "b", "p", "d")]


def test_kv_headroom_holds_a_job_back() -> None:
    talk = Talk(pair(kv_tokens=1000))
    talk.arrive(online("a", 600))
    assert talk.arrive(online("b", 200)) == []
    assert talk.say(Finished("a", 1)) == [("go", "b", "p", "d")]


def test_what_an_answer_really_takes_is_booked_as_it_grows() -> None:
    talk = Talk(pair(kv_tokens=1000))
    talk.arrive(online("a", 100))
    talk.say(FirstToken("a"), Progress((("a", 700),)))
    assert talk.core.ledgers["d"].reserved_tokens == 800
    assert talk.arrive(online("b", 100)) == []


def test_an_empty_server_takes_what_is_over_the_watermark() -> None:
    assert Talk(pair(kv_tokens=1000)).arrive(online("a", 990)) == [("go", "a", "p", "d")]


def test_no_more_jobs_than_may_run() -> None:
    talk = Talk(pair(max_running=2))
    assert len(talk.arrive(*(online(f"j{i}") for i in range(4)))) == 2


def test_the_least_loaded_servers_get_the_job() -> None:
    talk = Talk([prefill("p1"), prefill("p2"), decode("d1"), decode("d2")])
    assert talk.arrive(online("a", 500)) == [("go", "a", "p1", "d1")]
    assert talk.arrive(online("b", 100)) == [("go", "b", "p2", "d2")]
    assert talk.arrive(online("c", 100)) == [("go", "c", "p2", "d2")]


def test_round_robin_takes_each_server_in_turn() -> None:
    talk = Talk([unified("u1"), unified("u2")], Rules(place=RoundRobin()))
    jobs = [online(f"j{i}", 1000 if i == 1 else 10) for i in range(4)]
    assert [d[2] for d in talk.arrive(*jobs)] == ["u1", "u2", "u1", "u2"]


def test_unified_servers_share_what_decodes() -> None:
    """Without a prompt under way, the shorter step decides between them."""
    talk = Talk([unified("u1"), unified("u2")])
    talk.arrive(online("a", 1000))
    talk.say(FirstToken("a"))
    assert talk.arrive(online("b")) == [("go", "b", "u2")]


def test_a_pair_and_a_unified_server_compete() -> None:
    talk = Talk([prefill("p"), decode("d"), unified("u")])
    assert talk.arrive(online("a")) == [("go", "a", "p", "d")]
    assert talk.arrive(online("b")) == [("go", "b", "u")]


def test_a_unified_server_serves_when_no_decode_server_has_room() -> None:
    talk = Talk([prefill("p"), decode("d", max_running=1), unified("u")])
    talk.arrive(online("a"), online("b"))
    talk.say(PrefillDone("a"), FirstToken("a"), FirstToken("b"))
    assert talk.arrive(online("c", 5000)) == [("go", "c", "u")]


def test_online_decodes_on_strict_servers_and_offline_on_relaxed_ones() -> None:
    talk = Talk([prefill(), decode("s"), decode("r", pool=Pool.RELAXED)], LATENCY)
    assert talk.arrive(online("a"), offline("b")) == [
        ("go", "a", "p", "s"),
        ("go", "b", "p", "r"),
    ]


def test_online_never_spills_onto_a_relaxed_server() -> None:
    workers = [prefill(), decode("s", max_running=1), decode("r", pool=Pool.RELAXED)]
    talk = Talk(workers, LATENCY)
    assert talk.arrive(online("a"), online("b")) == [("go", "a", "p", "s")]


def test_a_kind_without_a_pool_of_its_own_shares() -> None:
    talk = Talk([unified("s")], LATENCY)
    assert talk.arrive(offline("a")) == [("go", "a", "s")]
    talk = Talk([unified("r", pool=Pool.RELAXED)], LATENCY)
    assert talk.arrive(online("a")) == [("go", "a", "r")]


def test_without_a_server_there_is_nothing_to_wait_for() -> None:
    for workers in ([], [prefill()], [decode()], [unified(model="x")]):
        assert Talk(workers).arrive(online("a", model="y")) == [("reject", "a", "no_worker")]


def test_a_prompt_that_no_server_could_hold_is_told_so() -> None:
    talk = Talk(pair(kv_tokens=1000))
    assert talk.arrive(offline("a", 1000)) == [("reject", "a", "request_too_large")]
    talk = Talk([prefill(kv_tokens=500), decode()])
    assert talk.arrive(online("a", 600)) == [("reject", "a", "request_too_large")]


def test_a_full_queue_is_full_for_its_own_kind_only() -> None:
    talk = Talk(one_at_a_time(), Rules(max_queued=2))
    talk.arrive(online("busy"))
    jobs = [offline("a"), offline("b"), offline("c"), online("d")]
    assert talk.arrive(*jobs) == [("reject", "c", "queue_full")]
    assert (talk.core.queued(Kind.OFFLINE), talk.core.queued(Kind.ONLINE)) == (2, 1)


def slow_prefill(talk: Talk) -> None:
    """Shows the core 1,000 prompt tokens a second."""
    talk.arrive(online("warm", 3000))
    talk.say(PrefillDone("warm"), at_us=3 * SECOND)
    talk.say(Finished("warm", 1))


def test_a_deadline_that_can_not_be_met_is_told_at_arrival() -> None:
    talk = Talk([prefill(chunk_tokens=1000), decode()])
    slow_prefill(talk)
    now = talk.now_us
    talk.arrive(*(online(f"j{i}", 4000, now) for i in range(3)))
    late = online("late", 4000, now)
    reject = talk.core.handle([Arrived(late)], now)[0]
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.retry_after_us) == (Reason.HOPELESS, 2 * SECOND)


def test_nothing_is_hopeless_while_no_rate_was_seen() -> None:
    talk = Talk([prefill(chunk_tokens=1000), decode()])
    jobs = [online(f"j{i}", 400_000) for i in range(5)]
    assert talk.arrive(*jobs) == [("go", "j0", "p", "d")]


def test_an_offline_backlog_makes_no_online_job_hopeless() -> None:
    """It goes after them all, however long it is."""
    talk = Talk([prefill(chunk_tokens=1000), decode()])
    slow_prefill(talk)
    now = talk.now_us
    talk.arrive(online("a", 4000, now), *(offline(f"o{i}", 50_000, now) for i in range(9)))
    assert talk.arrive(online("b", 1000, now), online("c", 1000, now)) == []
    assert talk.core.queued(Kind.ONLINE) == 2


def test_an_urgent_job_is_not_hopeless_behind_a_long_queue() -> None:
    talk = Talk([prefill(chunk_tokens=1000), decode()], Rules(order=Edf()))
    slow_prefill(talk)
    now = talk.now_us
    talk.arrive(*(online(f"j{i}", 4000, now) for i in range(3)))
    assert talk.arrive(online("urgent", 10, now, deadline_us=now + 1)) == []
    assert talk.say(PrefillDone("j0"), at_us=now + 1) == [("go", "urgent", "p", "d")]


def test_a_prompt_that_was_cancelled_says_nothing_about_the_rate() -> None:
    talk = Talk([prefill(chunk_tokens=1000), decode()])
    talk.arrive(online("a", 400_000))
    talk.say(Left("a"), at_us=10)
    talk.say(Freed("a"))
    assert talk.core.ledgers["p"].prefill_rate.tokens_per_us is None


def test_a_job_that_waited_too_long_is_told_so() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("busy"))
    talk.arrive(online("a"), offline("b"))
    assert talk.say(Wakeup(), at_us=PATIENCE_US) == [("reject", "a", "deadline_passed")]
    assert talk.say(Wakeup(), at_us=WINDOW_US) == [("reject", "b", "deadline_passed")]


def test_a_client_that_leaves_the_queue_leaves_nothing() -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    assert talk.say(Left("b")) == []
    assert talk.say(Finished("a", 1)) == []
    assert len(talk.core) == 0


def test_who_stood_behind_a_leaving_client_goes_at_once() -> None:
    talk = Talk(pair(kv_tokens=1000))
    talk.arrive(online("busy", 600))
    talk.arrive(online("big", 500), online("small", 10))
    assert talk.say(Left("big")) == [("go", "small", "p", "d")]


@pytest.mark.parametrize("heard", [(), (PrefillDone("a"),), (PrefillDone("a"), FirstToken("a"))])
def test_a_client_that_leaves_is_cancelled_once_and_its_room_freed_when_it_is(
    heard: tuple[PrefillDone | FirstToken, ...],
) -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    talk.say(*heard)
    assert talk.say(Left("a"), Left("a")) == [("cancel", "a", "client_left")]
    assert talk.say(Left("a"), Progress((("a", 3),)), FirstToken("a"), PrefillDone("a")) == []
    assert talk.say(Freed("a")) == [("go", "b", "p", "d")]


@pytest.mark.parametrize("end", [Finished("a", 1), broke("a", "d"), Freed("a")])
def test_whatever_ends_a_cancelled_job_ends_it(end: Finished | Freed) -> None:
    talk = Talk(one_at_a_time())
    talk.arrive(online("a"), online("b"))
    talk.say(Left("a"))
    assert talk.say(end) == [("go", "b", "p", "d")]
    assert len(talk.core) == 1


def test_leaving_and_finishing_in_one_instant_is_an_end() -> None:
    talk = Talk(pair())
    talk.arrive(online("a"))
    assert talk.say(Left("a"), Finished("a", 1)) == [("cancel", "a", "client_left")]
    assert talk.say(Freed("a")) == []
    assert all(ledger.is_empty for ledger in talk.core.ledgers.values())


def test_an_answer_without_a_first_token_is_an_answer() -> None:
    talk = Talk([unified()])
    talk.arrive(online("a"))
    assert talk.say(Finished("a", 9)) == []
    assert talk.core.ledgers["u"].is_empty


def test_other_rules_key_what_waits_anew() -> None:
    talk = Talk(one_at_a_time(), Rules(order=Fcfs()))
    talk.arrive(online("busy"))
    talk.arrive(online("old", at_us=1), online("urgent", at_us=2, deadline_us=3), at_us=2)
    talk.core.adopt(Rules(order=Edf()))
    assert talk.say(Finished("busy", 1)) == [("go", "urgent", "p", "d")]


def test_other_rules_take_effect_at_the_next_wakeup() -> None:
    talk = Talk(pair(), Rules(admit=Headroom(prefill_cap_tokens=100)))
    talk.arrive(online("a"), online("b"))
    talk.core.adopt(Rules())
    assert talk.say(Wakeup()) == [("go", "b", "p", "d")]


def test_a_reload_gives_no_retry_tokens_away() -> None:
    talk = Talk(pair())
    talk.arrive(online("a", 1000))
    talk.say(broke("a", "d"))
    left = talk.core.retry_budget_tokens
    talk.core.adopt(Rules())
    assert talk.core.retry_budget_tokens == left


def test_made_up_models_leave_no_lanes_behind() -> None:
    talk = Talk([unified()])
    for i in range(500):
        talk.arrive(online(f"j{i}", model=f"m{i}"))
        talk.say(Finished(f"j{i}", 1))
    assert len(talk.core._lanes) <= 65


def test_foreign_tokens_take_headroom() -> None:
    talk = Talk(pair(kv_tokens=1000))
    talk.arrive(online("a", 100))
    talk.say(LoadReport("d", load(700)), LoadReport("d", load(700)))
    assert talk.arrive(online("b", 200)) == []
    assert talk.say(LoadReport("d", load(100))) == [("go", "b", "p", "d")]
