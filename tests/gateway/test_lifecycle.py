from __future__ import annotations

import pytest

from gateway.lifecycle import TRANSITIONS, IllegalStep, State, Step, advance

TERMINAL = {State.DONE, State.REJECTED, State.FAILED, State.CANCELLED}


def test_every_state_has_a_row_and_terminal_rows_are_empty() -> None:
    assert TRANSITIONS.keys() == set(State)
    assert {state for state, row in TRANSITIONS.items() if not row} == TERMINAL


def test_every_state_can_be_reached_and_left_for_an_end() -> None:
    reached, frontier = {State.QUEUED}, [State.QUEUED]
    while frontier:
        found = set(TRANSITIONS[frontier.pop()].values()) - reached
        reached |= found
        frontier += found
    assert reached == set(State)
    assert all(TERMINAL & set(TRANSITIONS[s].values()) for s in set(State) - TERMINAL)


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("step", list(Step))
def test_nothing_follows_an_end(state: State, step: Step) -> None:
    with pytest.raises(IllegalStep, match=f"{step.name} while {state.name}"):
        advance(state, step)


def test_a_client_may_leave_at_any_time() -> None:
    living = set(State) - TERMINAL
    assert {advance(state, Step.CLIENT_LEFT) for state in living} == {State.CANCELLED}
