"""Servers in virtual time that do not answer: given up when the live gateway would."""

from __future__ import annotations

from typing import Any

import pytest

from policies.events import Failed, Fault, Finished, FirstToken
from policies.types import Job, Role
from tests.backends.test_simulated import Heard
from tests.gateway.talk import offline, online
from tests.simulated_fleet import left_over

PAIR = (Role.PREFILL, Role.DECODE)


def stuck(*roles: Role, paused: str, job: Job, **options: Any) -> Heard:
    """One server stands still from the beginning, and for good."""
    fleet = Heard(*roles, **options)
    fleet.backend.engines[paused].pause("in_place")
    fleet.ask(job)
    return fleet


@pytest.mark.parametrize(("job", "after_s"), [(online("a"), 60.0), (offline("a"), 600.0)])
def test_a_request_without_a_first_token_is_given_up(job: Job, after_s: float) -> None:
    fleet = stuck(*PAIR, paused="prefill0", job=job)
    fleet.run(20_000.0)
    [at_us, *_] = [us for us, it in fleet.events if isinstance(it, Failed)]
    [first, *_] = fleet.of(Failed)
    limit_s = min(after_s, 300.0)  # where the servers themselves give a pair up
    assert limit_s < at_us / 1e6 < limit_s + 5.0
    assert (first.fault is Fault.TIMEOUT) is (limit_s == after_s)
    assert left_over(fleet) == {}


def test_both_servers_of_a_pair_are_blamed_while_the_prompt_is_not_done() -> None:
    fleet = stuck(*PAIR, paused="prefill0", job=online("a"))
    fleet.run(100.0)
    assert fleet.of(Failed)[0].blamed == ("prefill0", "decode1")


def test_another_server_answers_what_a_stuck_one_did_not() -> None:
    roles = (Role.UNIFIED, Role.UNIFIED)
    fleet = stuck(*roles, paused="unified0", job=online("a", give_up_us=10**9))
    fleet.run(200.0)
    assert fleet.of(Failed) == [Failed("a", Fault.TIMEOUT, ("unified0",))]
    assert fleet.of(Finished) == [Finished("a", 10)]


def test_an_answer_that_has_begun_is_not_given_up_for_its_length() -> None:
    fleet = Heard(Role.UNIFIED)
    fleet.ask(online("a", max_tokens=5000), answer_tokens=5000)
    fleet.backend.first_token_s = dict.fromkeys(fleet.backend.first_token_s, 1.0)
    fleet.run(3000.0)
    assert fleet.of(FirstToken) == [FirstToken("a")]
    assert fleet.of(Failed) == []


def test_a_prefill_server_that_lost_a_pair_has_another_address_at_the_next_try() -> None:
    fleet = stuck(*PAIR, paused="prefill0", job=online("a"))
    engine = fleet.backend.engines["prefill0"]
    before = fleet.backend._address_of(engine)
    fleet.run(100.0)
    assert fleet.backend._address_of(engine) != before
