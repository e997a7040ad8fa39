"""The valves that hold whatever a packing chooses, and the line by which steps are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.packing import OnlinePaced, Running, StepUs
from policies.step_line import SeenStep, StepLine, fitted
from policies.stepping import STEPPING, captured, elected, holding

rows = st.builds(
    Running,
    context_tokens=st.integers(1, 20_000),
    produced=st.integers(0, 500),
    since_first_us=st.floats(0, 1e7),
    tpot_us=st.sampled_from([0.0, 5_000.0, 20_000.0, 100_000.0]),
    skipped=st.integers(0, 40),
    is_online=st.booleans(),
    must_step=st.booleans(),
)
sizes = st.sampled_from([(), (1, 2, 4, 8), (8, 16)])
LINE = StepLine(2_000.0, 300.0, 0.5)


@dataclass(frozen=True)
class Fixed:
    chosen: tuple[int, ...]
    by_longest: bool = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        return list(self.chosen)


def row(context: int = 100, *, skipped: int = 0, must: bool = False) -> Running:
    return Running(context, 1, 0.0, 0.0, skipped, must_step=must)


@given(st.lists(rows, min_size=1, max_size=24), sizes, st.sampled_from(sorted(STEPPING)))
def test_somebody_steps_whoever_must_does_and_nobody_twice(
    running: list[Running], sizes: tuple[int, ...], mode: str
) -> None:
    chosen = elected(STEPPING[mode], running, LINE.step_us, sizes)
    assert chosen == sorted(set(chosen))
    assert chosen
    assert {i for i, it in enumerate(running) if it.must_step} <= set(chosen)


@given(st.lists(rows, min_size=2, max_size=24))
def test_slack_makes_no_fewer_tokens_a_second_than_everyone_would(running: list[Running]) -> None:
    running = [it._replace(must_step=False) for it in running]
    chosen = elected(STEPPING["slack"], running, LINE.step_us)
    all_us, some_us = (
        LINE.step_us(len(part), sum(it.context_tokens for it in part))
        for part in (running, [running[i] for i in chosen])
    )
    assert len(chosen) / some_us >= len(running) / all_us * (1 - 1e-9)


def test_whoever_waited_longest_steps_where_nobody_was_chosen() -> None:
    assert elected(Fixed(()), [row(), row(skipped=3), row(skipped=3)], LINE.step_us) == [1]


def test_places_of_a_captured_size_are_filled_while_they_cost_next_to_nothing() -> None:
    running = [row(), row(), row(50_000, skipped=1), row(skipped=9)]
    assert elected(Fixed((0, 1)), running, LINE.step_us, (1, 4)) == [0, 1, 3]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 4), (8, 8), (9, 9)])
def test_beyond_the_largest_captured_size_there_is_no_graph(count: int, size: int) -> None:
    assert captured(count, (1, 2, 4, 8)) == size


def test_what_is_in_hand_is_lent_over_more_steps_than_one_choice_is_good_for() -> None:
    for hold_steps, over_steps in ((1, 8), (4, 8), (64, 128)):
        packing = holding(STEPPING["online-first"], hold_steps)
        assert isinstance(packing, OnlinePaced)
        assert packing.over_steps == over_steps
    assert holding(STEPPING["slack"], 64) is STEPPING["slack"]


def test_a_line_is_found_again_from_the_steps_that_it_made() -> None:
    seen = [
        SeenStep(count, context, LINE.step_us(count, context))
        for count in range(1, 12)
        for context in (1_000, 5_000, 30_000)
    ]
    found = fitted([*seen, SeenStep(4, 1_000, 5e6)])
    assert found is not None
    assert found == pytest.approx(LINE, rel=1e-3)


@given(
    st.lists(
        st.builds(
            SeenStep, st.integers(1, 32), st.integers(1, 100_000), st.floats(100.0, 50_000.0)
        ),
        min_size=1,
        max_size=60,
    )
)
def test_more_work_is_never_predicted_to_take_less_time(seen: list[SeenStep]) -> None:
    found = fitted(seen)
    assert found is not None
    assert min(found) >= 0


def test_steps_that_were_held_up_do_not_lift_the_line_where_steps_are_short() -> None:
    """A third of them, by as much whatever their size: more than the spread of the usual ones."""
    seen = [
        SeenStep(count, count * context, LINE.step_us(count, count * context))
        for count in range(1, 16)
        for context in (300, 1_000, 3_000)
    ]
    held_up = [step._replace(took_us=step.took_us + 6_000) for step in seen[::3]]
    found = fitted([*seen, *held_up])
    assert found is not None
    assert found.step_us(3, 3_000) == pytest.approx(LINE.step_us(3, 3_000), rel=0.05)


def test_from_nothing_nothing_is_said() -> None:
    assert fitted([]) is None
