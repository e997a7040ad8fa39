"""What a server takes of offline work, beside the online work that it has or expects."""

from __future__ import annotations

from typing import Any

import pytest

from policies.breaker import Breaker, BreakerRule
from policies.colocation import Colocated
from policies.ledger import Ledger
from policies.types import Pool, Role
from tests.gateway.talk import SECOND, offline, online, server
from tests.policies.sites import COST

RULE = Colocated(ttft_us=1_000_000, tpot_us=20_000)


def ledger(role: Role = Role.DECODE, pool: Pool = Pool.STRICT, **fields: Any) -> Ledger:
    made = Ledger(server("s", role, pool=pool, kv_tokens=400_000, **fields), Breaker(BreakerRule()))
    made.predict_by(COST)
    return made


def chat(to: Ledger, count: int, tpot_us: int = 20_000) -> Ledger:
    for _ in range(count):
        to.add_decode(500, 1000)
        to.online.came(1000, tpot_us, 0)
    return to


def ebbed(to: Ledger, count: int) -> Ledger:
    """So many of them have gone since the last second."""
    to.online.roll(SECOND)
    for _ in range(count):
        to.end_decode(500, 1000)
        to.online.went(20_000)
    return to


def batch(to: Ledger, count: int, context: int = 2000) -> Ledger:
    for _ in range(count):
        to.add_decode(context, context + 500)
        to.offline.add(context, context + 500)
    return to


def most(to: Ledger, rule: Colocated = RULE) -> int:
    """Offline jobs that it takes on top of what it has."""
    count = 0
    while rule.decode(offline("x", 2000), to) and count < 400:
        batch(to, 1)
        count += 1
    return count


def test_a_strict_server_is_filled_up_to_its_share_of_the_target() -> None:
    strict = chat(ledger(), 20)
    assert most(strict) > 10
    assert strict.steps is not None
    step_us = strict.steps.decode_us(strict.decodes, strict.context_tokens)
    assert 0.85 * 20_000 < step_us <= 0.9 * 20_000


def test_it_takes_less_where_someone_has_a_tighter_target() -> None:
    assert most(chat(chat(ledger(), 19), 1, 12_000)) < most(chat(ledger(), 20)) / 2


def test_it_keeps_room_for_those_who_were_there_a_moment_ago() -> None:
    quiet = most(chat(ledger(), 5))
    assert most(ebbed(chat(ledger(), 60), 55)) < quiet
    careless = Colocated(ttft_us=1_000_000, tpot_us=20_000, headroom=False)
    assert most(ebbed(chat(ledger(), 60), 55), careless) == quiet


@pytest.mark.parametrize("fields", [{"kv_tokens": 60_000}, {"max_running": 24}])
def test_room_is_kept_in_memory_and_seats_too(fields: dict[str, int]) -> None:
    strict = Ledger(server("s", Role.DECODE, **fields), Breaker(BreakerRule()))
    strict.predict_by(COST)
    ebbed(chat(strict, 20), 19)
    assert most(strict) > 0
    for _ in range(19):
        assert RULE.decode(online("x", 500), strict)
        chat(strict, 1)


def test_an_empty_server_takes_one_however_long_its_steps() -> None:
    slow = Colocated(ttft_us=1_000_000, tpot_us=1)
    assert slow.decode(offline("x", 2000), ledger())
    assert not slow.decode(offline("x", 2000), batch(ledger(), 1))


def test_a_relaxed_server_is_filled_up_to_its_saturation_batch() -> None:
    relaxed = batch(ledger(pool=Pool.RELAXED), 10, context=10)
    assert relaxed.steps is not None
    seats = relaxed.steps.saturation
    assert RULE.decode(offline("x", 10), batch(relaxed, seats - 11, context=10))
    assert not RULE.decode(offline("x", 10), batch(relaxed, 1, context=10))
    assert Colocated(gate=False).decode(offline("x", 10), relaxed)


def test_where_the_hardware_is_unknown_only_memory_counts() -> None:
    unknown = chat(ledger(), 300)
    unknown.predict_by(None)
    assert RULE.decode(offline("x", 100), unknown)


def prefilling(tokens: int, **fields: Any) -> Ledger:
    at = ledger(Role.PREFILL, chunk_tokens=8192, **fields)
    if tokens:
        at.add_prefill(tokens, 0)
    return at


@pytest.mark.parametrize(("waiting", "tokens"), [(0, 15_000), (4000, 1000)])
def test_an_offline_prompt_goes_where_it_keeps_nobody_waiting(waiting: int, tokens: int) -> None:
    assert RULE.prefill(offline("x", tokens), prefilling(waiting))
    assert RULE.prefills(offline("x", tokens), [prefilling(waiting)]) != []


def test_an_offline_prompt_waits_where_it_would_delay_an_online_one() -> None:
    busy = prefilling(4000)
    assert not RULE.prefill(offline("x", 12_000), busy)
    assert RULE.prefill(online("x", 12_000), busy)
    assert Colocated(ttft_us=1_000_000, gate=False).prefill(offline("x", 12_000), busy)


def test_where_no_rate_is_known_only_idle_servers_take_offline_prompts() -> None:
    for waiting, goes in ((0, True), (10, False)):
        unknown = prefilling(waiting)
        unknown.predict_by(None)
        assert RULE.prefill(offline("x", 10), unknown) is goes


def test_a_unified_server_with_online_answers_computes_one_offline_prompt_at_a_time() -> None:
    unified = chat(ledger(Role.UNIFIED), 5)
    assert RULE.prefill(offline("x", 500), unified)
    unified.add_prefill(500, 0)
    unified.offline.add_prefill(500)
    assert not RULE.prefill(offline("y", 500), unified)
    assert RULE.prefill(online("a", 500), unified)
    without = Colocated(ttft_us=1_000_000, tpot_us=20_000, gate=False)
    assert without.prefill(offline("y", 500), unified)


def test_a_unified_server_takes_no_offline_prompt_while_online_tokens_come_slowly() -> None:
    unified = chat(ledger(Role.UNIFIED), 5)
    unified.paced(100 * 17_000, 100, 1)
    assert RULE.prefill(offline("x", 500), unified)
    unified.online.forget_pace()
    unified.paced(100 * 19_000, 100, 1)
    assert not RULE.prefill(offline("x", 500), unified)


def test_a_prefill_server_does_not_mind_the_pace_of_answers() -> None:
    prefill = ledger(Role.PREFILL)
    assert RULE.prefill(offline("x", 500), prefill)


def test_a_unified_server_counts_the_prompts_between_its_steps() -> None:
    """As many jobs as begin also end: short answers bring more prompts than long ones."""
    both = [chat(ledger(role), 20) for role in (Role.UNIFIED, Role.DECODE)]
    assert 0 < most(both[0]) < most(both[1])
    brief = Colocated(ttft_us=1_000_000, tpot_us=20_000, output_reserve_tokens=64)
    assert most(chat(ledger(Role.UNIFIED), 20), brief) < most(chat(ledger(Role.UNIFIED), 20))


def test_what_a_token_is_seen_to_take_beyond_what_is_predicted_counts_for_the_next_job() -> None:
    strict = chat(ledger(), 20)
    room = most(strict)
    slow = chat(ledger(), 20)
    predicted_us = predicted(slow)
    slow.paced(100 * round(predicted_us + 2_000), 100, 1)
    assert 0 < most(slow) < room
    slow.online.forget_pace()
    assert most(slow) < room, "nothing better has been seen yet"
    as_told = chat(ledger(), 20)
    as_told.paced(100 * round(predicted_us - 2_000), 100, 1)
    assert most(as_told) == room


def predicted(of: Ledger) -> float:
    assert of.steps is not None
    return of.steps.decode_us(of.decodes, of.context_tokens)


def test_a_job_whose_answer_is_nearly_done_counts_as_one_like_it_that_begins() -> None:
    """Its prompt comes between the steps but once, however few of its tokens are left."""
    unified, fresh = chat(ledger(Role.UNIFIED), 20), offline("x", 500, max_tokens=128)
    last = offline("x", 626, max_tokens=1, made_tokens=127)
    assert RULE.decode(fresh, unified)
    assert RULE.decode(last, unified)
    assert not RULE.decode(last._replace(made_tokens=0), unified)
