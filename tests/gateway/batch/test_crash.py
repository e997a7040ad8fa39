"""Gateways and servers that are killed in mid batch: `benchmarks.batch_crash`, a short one."""

from __future__ import annotations

import pytest

from benchmarks.batch_crash import report_of, run_all

pytestmark = [pytest.mark.real_time, pytest.mark.timeout(120)]


async def test_a_batch_survives_kills_with_each_row_answered_once() -> None:
    outcomes = await run_all(rows=40, kills=2, seed=3, only="sqlite", tick=lambda _: None)
    assert [it.status for it in outcomes] == ["completed"] * 2
    assert [it.wrong for it in outcomes] == [0, 0]
    assert report_of(outcomes, 40, 0).exit_code == 0
