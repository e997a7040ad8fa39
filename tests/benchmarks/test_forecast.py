from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import pytest

from benchmarks.forecast import BELIEVED, READY, SERIES, forecast, measure, pools
from policies.forecast import LAST


def walk(count: int, seed: int) -> list[float]:
    random, values = Random(seed), [200.0]
    while len(values) < count:
        values.append(max(1.0, values[-1] * (1 + random.gauss(0.0, 0.1))))
    return values


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    rows = [
        f"{600 * at},{a},{b}"
        for at, (a, b) in enumerate(zip(walk(90, 1), walk(90, 2), strict=True))
    ]
    rows += [f"{600 * at},{a}," for at, a in enumerate(walk(10, 3), start=90)]
    with gzip.open(tmp_path / SERIES, "wt") as file:
        file.write("\n".join(["t_s,long,short", *rows]))
    return tmp_path


def test_pools_may_end_at_different_times(data: Path) -> None:
    found = pools(data / SERIES)
    assert {name: len(values) for name, values in found.items()} == {"long": 100, "short": 90}


def test_the_last_value_is_judged_as_the_last_value() -> None:
    values = [100.0] * 13 + [110.0, 99.0]
    found = forecast(values)
    under, over = found.accounts[LAST].under, found.accounts[LAST].over
    assert under == pytest.approx(10 / 309)
    assert over == pytest.approx(11 / 309)


def test_the_report_has_every_pool_and_every_check(data: Path) -> None:
    report = measure(data, quick=False)
    assert len(report.tables) == 2
    assert [check.unit for check in report.checks] == ["x", "%", "x", "ms"]


def test_the_upper_forecast_lies_above_the_believed_one() -> None:
    found = forecast(walk(200, 5))
    assert (found.accounts[READY].under or 0) < (found.accounts[BELIEVED].under or 0)
