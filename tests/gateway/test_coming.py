from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.coming import ARRIVES_S, Coming
from policies.types import Role

S = 1_000_000


def test_a_server_counts_from_its_start_until_it_is_seen() -> None:
    coming = Coming()
    coming.look({Role.PREFILL: 1}, 0)
    assert coming.count(Role.PREFILL) == 1
    coming.look({}, 1 * S)
    assert coming.count(Role.PREFILL) == 1
    coming.arrived(Role.PREFILL)
    assert coming.count(Role.PREFILL) == 0


def test_one_that_is_seen_before_its_start_has_ended_counts_once() -> None:
    coming = Coming()
    coming.look({Role.DECODE: 2}, 0)
    coming.arrived(Role.DECODE)
    assert coming.count(Role.DECODE) == 1
    coming.look({Role.DECODE: 1}, 1 * S)
    assert coming.count(Role.DECODE) == 1


def test_one_that_never_comes_is_given_up() -> None:
    coming = Coming()
    coming.look({Role.DECODE: 1}, 0)
    coming.look({}, 1 * S)
    coming.look({}, round((1 + ARRIVES_S) * S))
    assert coming.count(Role.DECODE) == 0


def test_one_that_nobody_here_has_started_is_nobody_that_was_waited_for() -> None:
    coming = Coming()
    coming.arrived(Role.PREFILL)
    coming.look({Role.PREFILL: 1}, 0)
    assert coming.count(Role.PREFILL) == 1


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=40))
def test_no_more_are_waited_for_than_were_started_and_never_fewer_than_none(
    steps: list[int | None],
) -> None:
    coming, most = Coming(), 0
    for second, starting in enumerate(steps):
        if starting is None:
            coming.arrived(Role.PREFILL)
        else:
            coming.look({Role.PREFILL: starting}, second * S)
            most += starting
        assert 0 <= coming.count(Role.PREFILL) <= most
