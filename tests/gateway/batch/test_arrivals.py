"""Room that uploads take before they are files."""

from __future__ import annotations

import pytest

from gateway.batch.arrivals import Arrivals
from gateway.batch.faults import QuotaExceeded
from gateway.batch.objects import Quota

QUOTA = Quota(stored_bytes=100, open_batches=1, open_rows=1)


def test_bytes_of_all_uploads_of_a_tenant_count_together() -> None:
    arrivals = Arrivals()
    one, other = (arrivals.arrival("a", QUOTA) for _ in range(2))
    one.begin(20, 0)
    other.begin(20, 0)
    one.add(50)
    with pytest.raises(QuotaExceeded):
        other.add(31)
    other.add(30)
    arrivals.arrival("b", QUOTA).begin(0, 100)


@pytest.mark.parametrize(("is_kept", "room"), [(True, 50), (False, 100)])
def test_what_was_kept_stays_and_what_was_given_up_leaves_its_room(
    *, is_kept: bool, room: int
) -> None:
    arrivals = Arrivals()
    one, other = (arrivals.arrival("a", QUOTA) for _ in range(2))
    for upload in (one, other):
        upload.begin(0, 0)
    one.add(50)
    one.end(is_kept=is_kept)
    one.end(is_kept=False)
    other.add(room)
    with pytest.raises(QuotaExceeded):
        other.add(1)
    other.end(is_kept=False)
    assert len(arrivals) == 0


def test_what_is_announced_counts_with_what_is_on_its_way() -> None:
    arrivals = Arrivals()
    one = arrivals.arrival("a", QUOTA)
    one.begin(0, 0)
    one.add(60)
    with pytest.raises(QuotaExceeded):
        arrivals.arrival("a", QUOTA).begin(0, 41)
