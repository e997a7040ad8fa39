"""What is made of the times to first token beside a batch."""

from __future__ import annotations

import os

import pytest

from benchmarks.batch_online import AGAIN, ALL, ALONE, BOTH, OFFLINE, Beside, Seen, ratios
from benchmarks.processes import cores_shared_out


def seen(**ms: float) -> dict[Beside, Seen]:
    """Two rounds of a hundred requests each, the slowest of each round as given."""
    found = {beside: Seen([[10.0] * 100, [10.0] * 100]) for beside in ALL}
    for beside in (ALONE, AGAIN, OFFLINE, BOTH):
        for each in found[beside].ttft_ms:
            each[-2:] = [ms.get(beside.name.replace(" ", "_"), 10.0)] * 2
    return found


def test_what_a_batch_adds_is_told_beside_what_one_thing_measured_twice_differs_by() -> None:
    found = ratios(seen(alone=100.0, alone_again=120.0, beside_a_batch_and_uploads=150.0))
    over_alone, over_offline = found.checked.values()
    assert found.same == pytest.approx(1.2)
    assert over_alone == pytest.approx(1.5)
    assert over_offline == pytest.approx(15.0)


def test_every_round_has_a_ratio_of_its_own() -> None:
    phases = seen(alone=100.0, alone_again=100.0, beside_a_batch_and_uploads=100.0)
    phases[BOTH].ttft_ms[1][-2:] = [300.0, 300.0]
    spread = ratios(phases).by_round["beside a batch and uploads over alone"]
    assert (spread.low, spread.high) == (1.0, 3.0)


def test_the_gateway_has_a_core_that_its_clients_do_not_have() -> None:
    before = os.sched_getaffinity(0)
    with cores_shared_out(pinned=True) as its_core:
        others = os.sched_getaffinity(0)
        with its_core():
            its = os.sched_getaffinity(0)
    assert its | others == before
    assert len(before) == 1 or not its & others
    assert os.sched_getaffinity(0) == before


def test_where_nothing_is_pinned_all_have_all_cores() -> None:
    before = os.sched_getaffinity(0)
    with cores_shared_out(pinned=False) as its_core, its_core():
        assert os.sched_getaffinity(0) == before
