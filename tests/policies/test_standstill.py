"""When an online job on a shared GPU is in danger, and when that is over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.breaker import Breaker, BreakerRule
from policies.calibration import DecodeMoments
from policies.events import Load
from policies.ledger import Ledger
from policies.standstill import Standstill
from policies.steps import Counters
from policies.types import Role
from tests.gateway.talk import SECOND, online, server
from tests.policies.sites import COST

RULE = Standstill()


def ledger(jobs: int = 1, context_tokens: int = 1000, *, known: bool = True) -> Ledger:
    made = Ledger(server("d", Role.DECODE), Breaker(BreakerRule()))
    made.predict_by(COST if known else None)
    for _ in range(jobs):
        made.add_decode(context_tokens, context_tokens)
        made.online.came(context_tokens, 0, 0)
    return made


@given(
    jobs=st.integers(0, 300),
    context_tokens=st.integers(1, 30_000),
    neighbours=st.integers(1, 3),
    target_us=st.integers(1_000, 200_000),
)
def test_whatever_is_calm_is_not_in_danger(
    jobs: int, context_tokens: int, neighbours: int, target_us: int
) -> None:
    rule, here = Standstill(tpot_us=target_us), ledger(jobs, context_tokens)
    if rule.is_calm(here, neighbours):
        assert not rule.is_in_danger(here, neighbours)


@given(jobs=st.integers(1, 300), target_us=st.integers(1_000, 200_000))
def test_one_neighbour_more_is_never_less_dangerous(jobs: int, target_us: int) -> None:
    rule, here = Standstill(tpot_us=target_us), ledger(jobs)
    assert rule.is_in_danger(here, 2) >= rule.is_in_danger(here, 1)


def test_nobody_is_in_danger_where_nobody_is() -> None:
    assert not Standstill(tpot_us=1).is_in_danger(ledger(0), 3)


def test_without_a_prediction_only_what_is_seen_counts() -> None:
    here = ledger(known=False)
    assert not Standstill(tpot_us=1).is_in_danger(here, 3)
    here.paced(300_000, 1, SECOND)
    assert RULE.is_in_danger(here, 1)
    assert not RULE.is_calm(here, 1)


def test_a_prompt_is_late_that_would_be_in_time_alone() -> None:
    here = ledger(0)
    assert here.steps is not None
    here.add_prefill(round(here.steps.prefill_tokens_per_us * 0.4 * SECOND), 0)
    job = online("a", deadline_us=SECOND)
    assert not RULE.is_late(job, here, 0, 0)
    assert RULE.is_late(job, here, 1, 0)


@pytest.mark.parametrize("known", [True, False])
def test_a_prompt_that_is_due_is_late(known: bool) -> None:  # noqa: FBT001  # pytest passes it
    here = ledger(0, known=known)
    here.add_prefill(100, 0)
    assert RULE.is_late(online("a"), here, 1, 2 * SECOND)


@pytest.mark.parametrize("crowded", [True, False])
def test_steps_beside_others_correct_no_prediction(crowded: bool) -> None:  # noqa: FBT001
    here = ledger()
    assert here.steps is not None
    for count in range(0, 5000, 100):
        here.crowded = crowded
        here.correct(load(count, seen_us=(1 + count) * 10_000))
    assert (here.steps.decode_factor == 1.0) is crowded
    assert here.crowded is False


def load(steps: int, seen_us: int) -> Load:
    """So many steps of one sequence, of 50 ms each."""
    moments = DecodeMoments(
        steps=steps,
        batch=steps,
        time_us=50_000 * steps,
        batch_squared=steps,
        batch_time_us=50_000 * steps,
        generated=steps,
    )
    counters = Counters(prefill_tokens=0, prefill_busy_us=0, decoded=moments)
    return Load(
        seen_us=seen_us, running=1, waiting=0, used_tokens=0, total_tokens=0, counters=counters
    )
