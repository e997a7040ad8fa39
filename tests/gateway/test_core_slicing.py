"""A long prompt in parts: what is booked for each, who goes between them, and where they go."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core import Rules
from policies.displace import Cheapest, Displace, Slices, Work
from policies.events import (
    Arrived,
    Dispatch,
    Failed,
    Fault,
    Finished,
    FirstToken,
    Freed,
    Left,
    PartDone,
    Preempted,
    PrefillDone,
    Reason,
    Recall,
    Reject,
    Wakeup,
    WorkerDown,
)
from policies.order import Shortest
from policies.types import Job, Worker
from tests.gateway.talk import SECOND, Talk, decode, offline, online, prefill, unified

CHUNK_TOKENS = 8_000
PAIR = (prefill(chunk_tokens=CHUNK_TOKENS), decode())
TWO = (*PAIR, prefill("q", chunk_tokens=CHUNK_TOKENS))


def job(name: str, tokens: int, at_us: int = SECOND, **fields: Any) -> Job:
    return online(name, tokens, at_us, **{"give_up_us": 10**12, **fields})


class Parts(Talk):
    """Servers that have shown that they compute 20,000 tokens a second."""

    def __init__(self, *workers: Worker, displace: Displace | None = None) -> None:
        super().__init__(list(workers), Rules(order=Shortest(), displace=displace or Slices()))
        for ledger in self.core.ledgers.values():
            ledger.prefill_rate.done(20_000, SECOND)

    def sent(self, *events: Any, at_us: int = SECOND) -> list[tuple[str, str | None, int]]:
        said = self.core.handle(events, at_us)
        return [(it.job.id, it.prefill, it.upto) for it in said if isinstance(it, Dispatch)]


def test_each_part_is_a_chunk_and_the_job_itself_is_the_last() -> None:
    talk = Parts(*PAIR)
    assert talk.sent(Arrived(job("a", 20_000))) == [("a", "p", 8_000)]
    assert talk.core.ledgers["p"].prefill_tokens == 8_000
    assert talk.core.ledgers["d"].reserved_tokens == 8_001
    assert talk.sent(PrefillDone("a"), PartDone("a")) == [("a", "p", 16_000)]
    assert talk.core.ledgers["p"].prefill_tokens == 8_000
    assert talk.sent(PrefillDone("a"), PartDone("a")) == [("a", "p", 0)]
    assert talk.core.ledgers["p"].prefill_tokens == 4_000
    talk.sent(PrefillDone("a"), FirstToken("a"), Finished("a", 1))
    ledgers = talk.core.ledgers.values()
    assert [(e.prefill_tokens, e.prefills, e.reserved_tokens) for e in ledgers] == [(0, 0, 0)] * 2
    assert len(talk.core) == 0


def test_a_prompt_of_two_chunks_goes_out_whole() -> None:
    assert Parts(*PAIR).sent(Arrived(job("a", 16_000))) == [("a", "p", 0)]


def test_a_shorter_prompt_goes_between_two_parts() -> None:
    talk = Parts(*PAIR)
    talk.sent(Arrived(job("long", 100_000)))
    assert talk.sent(Arrived(job("b", 7_000))) == [("b", "p", 0)], "beside the part"
    assert talk.sent(Arrived(job("c", 7_000))) == []
    assert talk.sent(PrefillDone("long"), PartDone("long")) == [("c", "p", 0)]
    assert talk.sent(PrefillDone("b")) == [("long", "p", 16_000)]


def test_one_long_prompt_at_a_time_has_parts_at_a_server() -> None:
    talk = Parts(*PAIR)
    talk.sent(Arrived(job("a", 60_000)))
    assert talk.sent(Arrived(job("b", 90_000))) == []
    assert talk.sent(Arrived(job("short", 91_000, cached_tokens=90_000))) == [("short", "p", 0)]
    assert talk.sent(PrefillDone("a")) == [], "its next part is about to be asked for"
    assert talk.sent(PartDone("a")) == [("a", "p", 16_000)]


def with_parts_done(count: int) -> Parts:
    """Both servers are full then, with nothing of `a` under way."""
    talk = Parts(*TWO)
    talk.sent(Arrived(job("a", 60_000)))
    for _ in range(count - 1):
        assert talk.sent(PartDone("a"))[0][1] == "p"
    assert talk.sent(Arrived(job("b", 15_000))) == [("b", "q", 0)]
    assert talk.sent(Arrived(job("c", 8_000))) == [("c", "p", 0)]
    assert talk.sent(Arrived(job("d", 8_000))) == []
    assert talk.sent(PartDone("a")) == [("d", "p", 0)]
    return talk


def test_the_next_part_waits_for_the_server_that_has_the_first_ones() -> None:
    talk = with_parts_done(3)
    assert talk.sent(PrefillDone("b")) == []
    assert talk.sent(PrefillDone("c")) == [("a", "p", 32_000)]


def test_others_use_the_server_that_it_does_not_wait_for() -> None:
    talk = with_parts_done(3)
    assert talk.sent(Arrived(job("longer", 70_000))) == []
    assert talk.sent(PrefillDone("b")) == [("longer", "q", 8_000)]


def test_what_is_computed_again_sooner_than_it_waits_goes_elsewhere() -> None:
    assert with_parts_done(1).sent(PrefillDone("b")) == [("a", "q", 8_000)]


def test_a_server_that_fails_has_nothing_of_it() -> None:
    talk = Parts(*TWO)
    talk.sent(Arrived(job("a", 60_000)))
    assert talk.sent(PartDone("a")) == [("a", "p", 16_000)]
    assert talk.sent(Failed("a", Fault.DIED, ("p",))) == [("a", "q", 8_000)]


def test_what_nobody_can_cut_goes_out_whole() -> None:
    talk = Parts(*PAIR)
    talk.sent(Arrived(job("a", 60_000)))
    assert talk.sent(PartDone("a", is_cut=False)) == [("a", "p", 0)]


def test_counted_tokens_take_the_place_of_the_estimate() -> None:
    talk = Parts(*PAIR)
    talk.sent(Arrived(job("a", 60_000)))
    assert talk.sent(PartDone("a", prompt_tokens=12_000)) == [("a", "p", 0)]
    assert talk.core.ledgers["p"].prefill_tokens == 4_000


def test_a_unified_server_takes_parts_too() -> None:
    talk = Parts(unified(chunk_tokens=CHUNK_TOKENS))
    assert talk.sent(Arrived(job("a", 20_000))) == [("a", None, 8_000)]
    assert talk.sent(PartDone("a")) == [("a", None, 16_000)]


def test_a_part_is_no_attempt() -> None:
    talk = Parts(*PAIR)
    said = talk.core.handle([Arrived(job("a", 40_000))], SECOND)
    said += talk.core.handle([PartDone("a")], SECOND)
    sent = [it for it in said if isinstance(it, Dispatch)]
    assert [(it.attempt, it.reason) for it in sent] == [
        (1, Reason.LEAST_WORK),
        (1, Reason.NEXT_PART),
    ]


def test_a_prompt_that_is_computed_part_by_part_is_not_refused_for_how_long_that_takes() -> None:
    talk = Parts(*PAIR)
    assert talk.sent(Arrived(job("a", 60_000, give_up_us=3 * SECOND)))
    for seconds in (4, 7, 10):
        assert talk.sent(PrefillDone("a"), PartDone("a"), at_us=seconds * SECOND)
    assert talk.sent(WorkerDown("p"), PartDone("a"), at_us=11 * SECOND) == []
    refused = [
        [it.reason for it in talk.core.handle([Wakeup()], at_us) if isinstance(it, Reject)]
        for at_us in (13 * SECOND - 1, 13 * SECOND)
    ]
    assert refused == [[], [Reason.EXPIRED]], "its patience of 2 s begins with each part"


def test_a_client_that_leaves_within_a_part_is_gone() -> None:
    talk = Parts(*PAIR)
    talk.sent(Arrived(job("a", 40_000)))
    assert talk.sent(Left("a"), PartDone("a")) == []
    assert talk.sent(Freed("a")) == []
    assert len(talk.core) == 0


@pytest.mark.parametrize("last", [PartDone("a"), Preempted("a")])
def test_a_part_that_is_taken_off_queues_again_however_it_ended(last: Any) -> None:
    talk = Parts(*PAIR)
    talk.sent(Arrived(offline("a", 40_000, SECOND)))
    talk.sent(Recall("a"))
    upto = 16_000 if isinstance(last, PartDone) else 8_000
    assert talk.sent(last) == [("a", "p", upto)]


def work(tokens: int, per_s: float, *, rate: float = 0.02) -> Work:
    return Work(tokens, CHUNK_TOKENS, rate, per_s / SECOND, has_begun=False)


def test_parts_are_cheaper_where_others_come_while_it_is_computed() -> None:
    # 80,000 tokens take 4 s: nine more turns of 50 ms against 0.6 s for each that may come.
    assert Cheapest().part_tokens(work(80_000, 1.0)) == CHUNK_TOKENS
    assert Cheapest().part_tokens(work(80_000, 0.1)) == 0
    assert Cheapest().part_tokens(work(80_000, 1.0, rate=0.0)) == 0, "nobody knows how long"


def test_the_arrivals_seen_decide() -> None:
    busy, calm = Parts(*PAIR, displace=Cheapest()), Parts(*PAIR, displace=Cheapest())
    for talk, gap_us in ((busy, SECOND // 10), (calm, 100 * SECOND)):
        for number in range(8):
            now_us = (1 + number) * gap_us
            talk.sent(Arrived(job(str(number), 10, now_us)), at_us=now_us)
            talk.sent(PrefillDone(str(number)), FirstToken(str(number)), at_us=now_us)
    assert busy.sent(Arrived(job("a", 80_000)), at_us=9 * SECOND // 10) == [("a", "p", 8_000)]
    assert calm.sent(Arrived(job("a", 80_000)), at_us=900 * SECOND) == [("a", "p", 0)]
