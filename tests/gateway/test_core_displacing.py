"""A long prompt under way, and a short one that comes: who computes when."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core import Rules
from policies.displace import ByCost
from policies.events import (
    Arrived,
    Dispatch,
    Finished,
    FirstToken,
    Left,
    Preempt,
    Preempted,
    PrefillDone,
    Reason,
)
from policies.order import Fcfs, Order, Shortest
from policies.types import Job, Worker
from tests.gateway.talk import SECOND, Talk, decode, offline, online, prefill, unified

LONG_TOKENS, SHORT_TOKENS = 100_000, 3_000


def fleet(*more: Worker) -> list[Worker]:
    return [prefill(chunk_tokens=8_000), decode(), *more]


def long(name: str = "long", at_us: int = SECOND, **fields: Any) -> Job:
    return online(name, LONG_TOKENS, at_us, **{"give_up_us": 10**12, **fields})


def short(name: str, at_us: int, **fields: Any) -> Job:
    return online(name, SHORT_TOKENS, at_us, **{"give_up_us": 10**12, **fields})


class Prefills(Talk):
    """Servers that have shown that they compute 20,000 tokens a second."""

    def __init__(self, workers: list[Worker], order: Order | None = None) -> None:
        rules = Rules(order=order or Shortest(), displace=ByCost())
        super().__init__(workers, rules)
        for ledger in self.core.ledgers.values():
            ledger.prefill_rate.done(20_000, SECOND)

    def decided(self, *events: Any, at_us: int) -> list[Any]:
        said = self.core.handle(events, at_us)
        return [each for each in said if isinstance(each, Dispatch | Preempt)]


def test_a_short_prompt_gets_the_server_and_the_long_one_goes_on_later() -> None:
    talk = Prefills(fleet())
    talk.say(Arrived(long()), at_us=SECOND)
    (preempt,) = talk.decided(Arrived(short("short", 3 * SECOND)), at_us=3 * SECOND)
    assert (preempt.job.id, preempt.reason) == ("long", Reason.DISPLACED)
    # 40,000 tokens are done: five chunks, and the last of them is not counted on.
    assert (preempt.job.cached_tokens, preempt.job.cached_on) == (32_000, "p")
    (sent,) = talk.decided(Preempted("long"), at_us=3 * SECOND + 1000)
    assert sent.job.id == "short"
    (again,) = talk.decided(PrefillDone("short"), at_us=4 * SECOND)
    assert (again.job.id, again.reason) == ("long", Reason.REQUEUED)
    assert talk.core.ledgers["p"].prefill_tokens == LONG_TOKENS - 32_000


def test_the_books_are_empty_when_both_have_ended() -> None:
    talk = Prefills(fleet())
    talk.say(Arrived(long()), at_us=SECOND)
    talk.say(Arrived(short("short", 3 * SECOND)), at_us=3 * SECOND)
    talk.say(Preempted("long"))
    for name in ("short", "long"):
        talk.say(PrefillDone(name), FirstToken(name), Finished(name, 1))
    ledgers = talk.core.ledgers.values()
    assert [(e.prefill_tokens, e.prefills, e.reserved_tokens) for e in ledgers] == [(0, 0, 0)] * 2
    assert len(talk.core) == 0


def test_only_one_makes_way_for_one() -> None:
    talk = Prefills(fleet())
    talk.say(Arrived(long()), at_us=SECOND)
    assert talk.decided(Arrived(short("a", 3 * SECOND)), at_us=3 * SECOND)
    assert talk.decided(Arrived(short("0", 3 * SECOND)), at_us=3 * SECOND + 100) == []


@pytest.mark.parametrize(
    ("head", "at_us"),
    [
        (short("nearly done", 5 * SECOND), 5 * SECOND),
        (long("longer", 2 * SECOND, prompt_tokens=150_000), 2 * SECOND),
        (offline("nobody waits", SHORT_TOKENS, 2 * SECOND), 2 * SECOND),
    ],
)
def test_what_saves_too_little_displaces_nobody(head: Job, at_us: int) -> None:
    talk = Prefills(fleet())
    talk.say(Arrived(long()), at_us=SECOND)
    assert talk.decided(Arrived(head), at_us=at_us) == []


def test_the_order_has_the_last_word() -> None:
    talk = Prefills(fleet(), Fcfs())
    talk.say(Arrived(long()), at_us=SECOND)
    assert talk.decided(Arrived(short("short", 2 * SECOND)), at_us=2 * SECOND) == []


def test_a_client_that_reads_already_is_not_interrupted() -> None:
    talk = Prefills([unified(chunk_tokens=8_000)])
    talk.say(Arrived(long()), at_us=SECOND)
    talk.say(FirstToken("long"), at_us=2 * SECOND)
    assert all(
        isinstance(it, Dispatch)
        for it in talk.decided(Arrived(short("short", 3 * SECOND)), at_us=3 * SECOND)
    )


def test_a_long_prompt_makes_way_only_so_often() -> None:
    talk, rule = Prefills(fleet()), ByCost()
    talk.say(Arrived(long()), at_us=SECOND)
    ways = 0
    for turn in range(1, 40):
        now_us, name = (1 + turn) * SECOND, f"s{turn:02}"
        said = talk.decided(Arrived(short(name, now_us)), at_us=now_us)
        if any(isinstance(it, Preempt) for it in said):
            ways += 1
            talk.decided(Preempted("long"), at_us=now_us + 1)
        if ways == rule.most_times:
            break
        talk.decided(PrefillDone(name), at_us=now_us + 150_000)
        talk.core._tickets["long"].job = long()  # and nothing of it was kept
    assert ways == rule.most_times
    now_us += SECOND // 4
    talk.decided(PrefillDone(name), at_us=now_us)
    late = short("late", now_us + SECOND)
    assert talk.decided(Arrived(late), at_us=now_us + SECOND) == []


def test_a_client_that_leaves_while_its_prompt_makes_way_is_gone() -> None:
    talk = Prefills(fleet())
    talk.say(Arrived(long()), at_us=SECOND)
    talk.say(Arrived(short("short", 3 * SECOND)), at_us=3 * SECOND)
    talk.say(Left("long"))
    assert [it.job.id for it in talk.decided(Preempted("long"), at_us=3 * SECOND + 9)] == ["short"]
    assert len(talk.core) == 1
