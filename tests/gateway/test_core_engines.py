"""Conversations with servers whose engines do by themselves what the gateway does elsewhere."""

from __future__ import annotations

import pytest

from policies import ledger as ledger_of
from policies.events import StepsSeen
from policies.step_line import SeenStep
from policies.types import Pool, Worker
from tests.gateway.talk import Talk, decode, offline, online, prefill
from tests.gateway.test_core_giving_way import LONG, RULES
from tests.policies.test_colocation import chat, ledger, most

DISPLACES, SELECTS = frozenset({ledger_of.DISPLACES}), frozenset({"decode", ledger_of.SELECTS})
BLIND = frozenset({"decode"})
"""It is told to choose, and cannot, or does not mind who is online."""


def fleet(*, before: frozenset[str] = frozenset(), strict: frozenset[str]) -> list[Worker]:
    return [
        prefill(chunk_tokens=8192, engine=before),
        decode("d", kv_tokens=1_000_000, max_running=256, engine=strict),
        decode("r", pool=Pool.RELAXED),
    ]


def test_an_online_prompt_goes_beside_an_offline_one_where_the_engine_puts_that_aside() -> None:
    talk = Talk(fleet(before=DISPLACES, strict=frozenset()), RULES)
    assert talk.arrive(offline("a", LONG)) == [("go", "a", "p", "r")]
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]


def test_elsewhere_the_offline_one_is_taken_off() -> None:
    talk = Talk(fleet(strict=frozenset()), RULES)
    talk.arrive(offline("a", LONG))
    assert talk.arrive(online("b")) == [("preempt", "a", "online_prefill")]


def test_online_prompts_wait_behind_each_other_as_ever() -> None:
    talk = Talk(fleet(before=DISPLACES, strict=frozenset()), RULES)
    talk.arrive(online("a", LONG))
    assert talk.arrive(online("b", LONG)) == []


def test_a_server_that_leaves_offline_requests_out_of_steps_is_lent_more_of_them() -> None:
    stock, own = chat(ledger(), 20), chat(ledger(engine=SELECTS), 20)
    assert most(own) > most(stock) > 0
    assert own.reserved_tokens <= own.kv_tokens


def test_one_that_does_not_leave_them_out_is_lent_as_many_as_a_stock_one() -> None:
    stock, blind = chat(ledger(), 20), chat(ledger(engine=BLIND), 20)
    assert most(blind) == most(stock)


def test_steps_that_are_told_correct_what_is_predicted() -> None:
    talk = Talk(fleet(strict=frozenset()), RULES)
    steps = talk.core.ledgers["d"].steps
    assert steps is not None
    predicted_us = steps.decode_us(8, 16_000)
    talk.say(StepsSeen("d", tuple(SeenStep(8, 16_000, 2 * predicted_us) for _ in range(20))))
    assert steps.decode_us(8, 16_000) == pytest.approx(2 * predicted_us, rel=0.01)


def test_steps_of_a_server_that_nobody_knows_change_nothing() -> None:
    talk = Talk(fleet(strict=frozenset()), RULES)
    assert talk.say(StepsSeen("gone", (SeenStep(1, 10, 5.0),))) == []


def test_the_line_that_an_engine_is_told_is_that_of_the_cost_model() -> None:
    talk = Talk(fleet(strict=frozenset()), RULES)
    steps = talk.core.ledgers["d"].steps
    assert steps is not None
    line = steps.step_line
    assert line is not None
    for count in (1, 16, 64):
        told_us = line.step_us(count, 2_000 * count)
        assert told_us == pytest.approx(steps.decode_us(count, 2_000 * count), rel=0.15)
