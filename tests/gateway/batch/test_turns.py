"""Whose rows go next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.batch.turns import Standing, deal

HOUR_US = 3_600_000_000


def standing(
    seq: int, tenant: str = "a", *, queued: int = 100, claimed: int = 0, hours: float = 24
) -> Standing:
    deadline_us = round(hours * HOUR_US)
    return Standing(seq=seq, tenant=tenant, queued=queued, claimed=claimed, deadline_us=deadline_us)


def test_tenants_share_alike_however_many_batches_they_have() -> None:
    many = [standing(n, "a") for n in range(9)]
    dealt = deal([*many, standing(9, "b")], 20, 0)
    assert dealt[9] == 10


def test_a_tenant_that_runs_much_already_waits_for_the_others() -> None:
    dealt = deal([standing(1, "a", claimed=30), standing(2, "b", claimed=10)], 10, 0)
    assert dealt == {2: 10}


def test_a_tenants_batches_go_by_the_pressure_of_their_windows() -> None:
    dealt = deal([standing(1, hours=1), standing(2, hours=4)], 50, 0)
    assert dealt == {1: 40, 2: 10}


def test_short_windows_take_nothing_from_other_tenants() -> None:
    dealt = deal([standing(1, "a", hours=0.1), standing(2, "b")], 10, 0)
    assert dealt == {1: 5, 2: 5}


def test_what_one_cannot_use_others_have() -> None:
    assert deal([standing(1, "a", queued=2), standing(2, "b")], 10, 0) == {1: 2, 2: 8}


def test_a_batch_past_its_window_goes_first_and_divides_by_nothing() -> None:
    dealt = deal([standing(1, hours=-1), standing(2)], 10, 0)
    assert dealt == {1: 10}


standings = st.lists(
    st.builds(
        standing,
        seq=st.integers(1, 10**6),
        tenant=st.sampled_from("abc"),
        queued=st.integers(0, 50),
        claimed=st.integers(0, 50),
        hours=st.floats(0.01, 100),
    ),
    max_size=12,
    unique_by=lambda one: one.seq,
)


@given(standings, st.integers(0, 200))
def test_as_many_are_dealt_as_there_are_and_as_there_is_room(
    given_: list[Standing], room: int
) -> None:
    dealt = deal(given_, room, 0)
    queued = {one.seq: one.queued for one in given_}
    assert sum(dealt.values()) == min(room, sum(queued.values()))
    assert all(0 < rows <= queued[seq] for seq, rows in dealt.items())


@given(standings, st.integers(1, 200))
def test_no_tenant_is_ahead_of_another_that_still_waits(given_: list[Standing], room: int) -> None:
    """Unless it was before."""
    dealt = deal(given_, room, 0)
    running: dict[str, int] = {}
    took: set[str] = set()
    waits: set[str] = set()
    for one in given_:
        rows = dealt.get(one.seq, 0)
        running[one.tenant] = running.get(one.tenant, 0) + one.claimed + rows
        if rows:
            took.add(one.tenant)
        if rows < one.queued:
            waits.add(one.tenant)
    assert all(running[had] <= running[waiting] + 1 for had in took for waiting in waits)
