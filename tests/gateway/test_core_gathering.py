"""Short prompts that go together, long ones that go alone, ultra-short ones that stay whole."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.core import Rules
from policies.breaker import Breaker, BreakerRule
from policies.events import Arrived, Dispatch, Left, PrefillDone, WakeAt, Wakeup
from policies.gather import AtOnce, ByLength
from policies.ledger import Ledger
from policies.order import Fcfs, Order, Shortest
from policies.types import Worker
from tests.gateway.talk import SECOND, Talk, decode, online, prefill, unified

CAP, WAIT_US = 1_000, 50_000
PAIRS = [prefill("p1"), prefill("p2"), decode()]


class Gathering(Talk):
    """Batches of 1,000 tokens; a short prompt is held for 50 ms of its two seconds at most."""

    def __init__(self, workers: list[Worker], order: Order | None = None) -> None:
        super().__init__(workers, Rules(order=order or Fcfs(), gather=ByLength(cap_tokens=CAP)))

    def sent(self, *events: Any, at_us: int) -> dict[str, str]:
        """Which jobs go to which prefill servers."""
        said = self.core.handle(events, at_us)
        return {it.job.id: it.prefill or it.decode for it in said if isinstance(it, Dispatch)}

    def come(self, at_us: int, **tokens: int) -> dict[str, str]:
        jobs = [Arrived(online(name, count, at_us)) for name, count in tokens.items()]
        return self.sent(*jobs, at_us=at_us)


def test_a_short_prompt_waits_for_company_and_no_longer_than_its_target_allows() -> None:
    talk = Gathering(PAIRS)
    said = talk.core.handle([Arrived(online("a", 600))], 0)
    assert said == [WakeAt(WAIT_US)]
    assert talk.sent(Wakeup(), at_us=WAIT_US) == {"a": "p1"}


def test_a_tight_target_shortens_the_wait() -> None:
    talk = Gathering(PAIRS)
    hurried = online("a", 600, deadline_us=200_000)
    assert talk.core.handle([Arrived(hurried)], 0) == [WakeAt(10_000)]


def test_a_full_bucket_goes_at_once_and_to_one_server() -> None:
    talk = Gathering(PAIRS)
    assert talk.come(0, a=300, b=300) == {}
    assert talk.come(1_000, c=400) == {"a": "p1", "b": "p1", "c": "p1"}


def test_what_does_not_fit_into_the_batch_goes_to_the_next_server() -> None:
    talk = Gathering(PAIRS)
    assert talk.come(0, a=600, b=700) == {"a": "p1", "b": "p2"}


def test_a_long_prompt_goes_at_once_and_nobody_goes_with_it() -> None:
    talk = Gathering([prefill("p1"), decode()])
    assert talk.come(0, a_long=5_000, b=300, c=800) == {"a_long": "p1"}


def test_a_server_has_one_batch_under_way_and_one_that_waits() -> None:
    talk = Gathering([prefill("p1"), decode()])
    assert talk.come(0, first=5_000) == {"first": "p1"}
    assert talk.come(SECOND, second=2_000) == {"second": "p1"}
    assert talk.come(2 * SECOND, third=2_000) == {}
    assert talk.sent(PrefillDone("first"), at_us=3 * SECOND) == {"third": "p1"}


def test_the_order_says_who_is_in_the_next_batch() -> None:
    talk = Gathering([prefill("p1"), decode()], Shortest())
    talk.come(0, first=5_000)
    talk.come(1, second=2_000)
    assert talk.come(2, large=900, small=100, middle=300) == {}
    assert talk.sent(PrefillDone("first"), at_us=SECOND) == {"small": "p1", "middle": "p1"}


def test_ultra_short_prompts_go_to_a_unified_server_while_it_has_room() -> None:
    talk = Gathering([prefill("p1"), decode(), unified("u", max_running=1)])
    assert talk.come(0, a=2_000) == {"a": "p1"}
    talk.come(1, b=500)
    assert talk.sent(Wakeup(), at_us=1 + WAIT_US) == {"b": "u"}
    talk.come(SECOND, c=500)
    assert talk.sent(Wakeup(), at_us=SECOND + WAIT_US) == {"c": "p1"}


def test_a_bucket_whose_only_prompt_has_left_does_not_hurry_the_next_one() -> None:
    talk = Gathering(PAIRS)
    talk.come(0, a=100)
    talk.core.handle([Left("a")], 1_000)
    assert talk.core.queued(online("a").kind) == 0
    assert talk.sent(Wakeup(), at_us=WAIT_US) == {}


def test_unified_servers_alone_hold_nobody_back() -> None:
    assert Gathering([unified("u")]).come(0, a=100) == {"a": "u"}


@given(st.lists(st.integers(1, 3_000), min_size=1, max_size=40))
def test_no_batch_is_larger_than_the_cap_unless_it_is_one_prompt(prompts: list[int]) -> None:
    gather, books = ByLength(cap_tokens=CAP), Ledger(prefill("p"), Breaker(BreakerRule()))
    batch: list[int] = []
    for number, tokens in enumerate(prompts):
        job, now_us = online(f"{number}", tokens), number // 4
        if books.sent_us != now_us:
            batch = []
        if gather.servers(job, [books], now_us):
            books.add_prefill(tokens, now_us)
            batch.append(tokens)
        assert len(batch) < 2 or sum(batch) <= CAP


def test_without_it_nobody_is_held_and_every_free_server_will_do() -> None:
    books = [Ledger(prefill("p"), Breaker(BreakerRule()))]
    assert AtOnce().due_us(online("a", 1), 0, 1, books, 0) == 0
    assert AtOnce().servers(online("a", 1), books, 0) is books
