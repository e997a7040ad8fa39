"""Slack as the paper prints it, and as it is repaired."""

from __future__ import annotations

from policies.hrrn import Hrrn
from policies.order import Outlook, Shortest
from policies.salvage import Salvage
from policies.slack import Kairos
from tests.gateway.talk import SECOND, online

EIGHT = {"deadline_us": 8 * SECOND}
"""Prompts that came at 0 with a target of 8 s, as in the paper."""


def at(seconds: float, ahead_tokens: int = 0, servers: int = 1) -> Outlook:
    """At the paper's rate: 20,000 tokens a second."""
    return Outlook(round(seconds * SECOND), 0.02, servers, ahead_tokens)


def test_the_printed_urgency_is_the_share_of_the_target_left_for_each_token() -> None:
    # 20,000 tokens before it and 20,000 of its own: done after 2 s, 6 of 8 s are left.
    key = Kairos().key(online("a", 20_000, **EIGHT), at(0, 20_000))
    assert key[0] == -round(10**15 * (6 / 8) / 20_000)


def test_more_servers_are_predicted_to_be_done_sooner() -> None:
    job = online("a", 20_000, **EIGHT)
    assert Kairos().key(job, at(0, 20_000, servers=2)) < Kairos().key(job, at(0, 20_000))


def test_as_printed_the_longest_of_the_doomed_goes_first() -> None:
    short, long = online("short", 1_000, **EIGHT), online("long", 100_000, **EIGHT)
    assert Kairos().key(short, at(1)) < Kairos().key(long, at(1))
    assert Kairos().key(long, at(20)) < Kairos().key(short, at(20))


def test_salvage_puts_the_doomed_last_and_the_shortest_first() -> None:
    # At 7 s what takes more than one second is late: 20,000 tokens.
    jobs = [online(str(it), it * 1000, **EIGHT) for it in (30, 10, 21, 19)]
    assert [j.id for j in sorted(jobs, key=lambda j: Salvage().key(j, at(7)))] == [
        "10",
        "19",
        "21",
        "30",
    ]
    fresh = online("fresh", 60_000, 7 * SECOND, deadline_us=15 * SECOND)
    assert Salvage().key(jobs[3], at(7)) < Salvage().key(fresh, at(7))
    assert Salvage().key(fresh, at(7)) < Salvage().key(jobs[2], at(7))


def test_only_its_own_work_dooms_a_prompt() -> None:
    job = online("a", 10_000, **EIGHT)
    assert Salvage().key(job, at(7, 10**9)) == Salvage().key(job, at(7))


def test_who_has_waited_for_five_targets_competes_again() -> None:
    job, fresh = online("a", 10_000, **EIGHT), online("b", 20_000, 40 * SECOND)
    later = fresh._replace(deadline_us=80 * SECOND)
    assert Salvage().key(later, at(40)) < Salvage().key(job, at(40))
    assert Salvage().key(job, at(40.1)) < Salvage().key(later, at(40.1))


def test_what_is_cached_is_no_work() -> None:
    job, other = online("a", 10_000, cached_tokens=9_000), online("b", 2_000)
    for order in (Salvage(), Shortest()):
        assert order.key(job, at(0)) < order.key(other, at(0))


def test_a_response_ratio_grows_faster_for_the_short() -> None:
    long, short = online("long", 10_000), online("short", 1_000, 9 * SECOND)
    assert Hrrn().key(long, at(9.5)) < Hrrn().key(short, at(9.5))
    assert Hrrn().key(short, at(10.5)) < Hrrn().key(long, at(10.5))
