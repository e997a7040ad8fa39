from __future__ import annotations

import pytest

from gateway.ingress import Ingress
from policies.events import (
    Arrived,
    Failed,
    Fault,
    Finished,
    FirstToken,
    Left,
    Preempted,
    Progress,
    Reason,
    Reject,
)
from policies.monitor import Seen
from policies.types import Kind
from tests.gateway.talk import SECOND, offline, online

ONLINE = Kind.ONLINE


def test_what_waits_is_counted_until_its_first_token() -> None:
    ingress = Ingress(0)
    for number in range(3):
        job = online(f"j{number}", tokens=200, at_us=number * SECOND, cached_tokens=50)
        ingress.hear(number * SECOND, Arrived(job))
    ingress.hear(3 * SECOND, FirstToken("j0"))
    assert (ingress.waiting, ingress.waiting_tokens) == (2, 300)
    assert ingress.oldest_wait_s(5 * SECOND, 0) == 4.0
    assert ingress.oldest_wait_s(5 * SECOND, 1) == 3.0
    assert ingress.mean(Seen.TTFT, 5 * SECOND) == 3 * SECOND


@pytest.mark.parametrize("gone", [Left("a"), Reject(online("a"), Reason.QUEUE_FULL)])
def test_what_goes_unserved_waits_no_more(gone: Left | Reject) -> None:
    ingress = Ingress(0)
    ingress.hear(0, Arrived(online("a")))
    if isinstance(gone, Left):
        ingress.hear(1, gone)
    else:
        ingress.decided(gone)
    assert ingress.waiting == 0
    assert ingress.oldest_wait_s(SECOND, 0) == 0.0


def test_an_answer_has_the_tokens_of_all_its_attempts() -> None:
    ingress = Ingress(0)
    ingress.hear(0, Arrived(online("a")))
    ingress.hear(SECOND, FirstToken("a"))
    ingress.hear(2 * SECOND, Preempted("a", 10))
    ingress.hear(3 * SECOND, Failed("a", Fault.DIED, generated=5))
    ingress.hear(6 * SECOND, Finished("a", 6))
    assert ingress.mean(Seen.ANSWER, 6 * SECOND) == 21.0
    assert ingress.mean(Seen.TPOT, 6 * SECOND) == 5 * SECOND / 20
    assert ingress.mean(Seen.STAY, 6 * SECOND) == 6 * SECOND


def test_answers_are_as_long_as_they_are_made_not_as_those_that_have_ended() -> None:
    """Of a new kind of requests the short answers end first."""
    ingress = Ingress(0)
    ingress.look(ONLINE, 10.0, 0)
    for number in range(10):
        ingress.hear(SECOND, Arrived(online(f"j{number}", at_us=SECOND)))
        ingress.hear(SECOND, FirstToken(f"j{number}"))
    ingress.hear(2 * SECOND, Finished("j0", 20))
    ingress.hear(2 * SECOND, Finished("j1", 40))
    ingress.hear(9 * SECOND, Progress(tuple((f"j{n}", 500) for n in range(2, 10))))
    assert ingress.look(ONLINE, 10.0, 10 * SECOND).answer.mean == (60 + 8 * 500) / 2


def test_before_any_answer_has_ended_those_that_run_are_taken_to_be_half_way() -> None:
    ingress = Ingress(0)
    for name in ("a", "b", "waits"):
        ingress.hear(0, Arrived(online(name)))
    ingress.hear(SECOND, Progress((("a", 100), ("b", 300))))
    assert ingress.look(ONLINE, 10.0, 10 * SECOND).answer.mean == 400.0


def test_offline_work_is_a_flow_of_its_own_and_nobody_waits_for_it() -> None:
    ingress = Ingress(0)
    ingress.hear(SECOND, Arrived(offline("a", tokens=700)))
    found = ingress.look(Kind.OFFLINE, 10.0, 10 * SECOND)
    assert found.rate_per_s == pytest.approx(1 / 9)
    assert found.prompt.mean == 700.0
    assert ingress.waiting == 0
    assert ingress.look(ONLINE, 10.0, 10 * SECOND).rate_per_s == 0.0
