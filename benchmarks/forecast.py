"""How far the forecasts of the next ten minutes are off, always beside the last value.

Fourteen days of real request rates of four model pools (ServeGen), one step ahead. The table has
each forecaster, the one that the controller believes, and the upper quantile that it is ready for.
"""

from __future__ import annotations

import csv
import gzip
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from benchmarks.report import Check, Goal, Report, Spread, command_line, number
from policies.forecast import FORECAST, LAST, Forecaster, Outlook

DATA = Path(__file__).parents[2] / "shared" / "data"
SERIES = Path("traces/servegen_14d_rps_by_10min.csv.gz")
QUANTILE = 0.9
FIRST = 12
"""Steps before it are history only."""
QUICK_STEPS = 400
BELIEVED, READY = "believed", f"upper {QUANTILE:.0%}"
LOSS = 1.02
"""What choosing may cost against the last value alone."""


@dataclass(slots=True)
class Accuracy:
    """How forecasts compared with what came."""

    count: int = 0
    covered: int = 0
    _share_sum: float = 0.0
    _counted: int = 0
    _under: float = 0.0
    _over: float = 0.0
    _load: float = 0.0
    believed: dict[str, int] = field(default_factory=dict)

    def add(self, told: float, value: float, *, by: str = "") -> None:
        self.count += 1
        self.covered += value <= told
        if value > 0:
            self._share_sum += abs(value - told) / value
            self._counted += 1
        self._under += max(0.0, value - told)
        self._over += max(0.0, told - value)
        self._load += value
        if by:
            self.believed[by] = self.believed.get(by, 0) + 1

    @property
    def mape(self) -> float | None:
        """Of the intervals that had any load."""
        return self._share_sum / self._counted if self._counted else None

    @property
    def under(self) -> float | None:
        """Load that came above the forecast, as a share of all."""
        return self._under / self._load if self._load else None

    @property
    def over(self) -> float | None:
        return self._over / self._load if self._load else None

    @property
    def coverage(self) -> float | None:
        return self.covered / self.count if self.count else None


@dataclass(slots=True)
class Found:
    """One pool."""

    steps: int
    ms_per_step: float
    accounts: dict[str, Accuracy] = field(default_factory=dict)

    def error(self, name: str) -> float:
        """All errors over all load: low loads weigh little in it."""
        account = self.accounts[name]
        return (account.under or 0.0) + (account.over or 0.0)


def pools(path: Path) -> dict[str, list[float]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    names = [name for name in rows[0] if name != "t_s"]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def forecast(values: list[float]) -> Found:
    told: dict[str, float] = {}

    def heard(name: str, forecaster: Forecaster) -> Forecaster:
        def kept(series: Sequence[float]) -> float:
            told[name] = max(0.0, forecaster(series))
            return told[name]

        return kept

    outlook = Outlook(
        forecasters={name: heard(name, one) for name, one in FORECAST.items()}, quantile=QUANTILE
    )
    accounts = {name: Accuracy() for name in (*FORECAST, BELIEVED, READY)}
    began = time.process_time()
    for at, value in enumerate(values):
        if at >= FIRST:
            prediction = outlook.predict()
            for name, forecast_value in told.items():
                accounts[name].add(forecast_value, value)
            accounts[BELIEVED].add(prediction.point, value, by=prediction.by)
            accounts[READY].add(prediction.upper, value)
        outlook.observe(value)
    spent_s = time.process_time() - began
    return Found(len(values), spent_s * 1e3 / len(values), accounts)


def table_of(name: str, found: Found) -> Table:
    table = Table(title=f"{name}: {found.steps} steps of 10 minutes", title_justify="left")
    columns = ("forecast", "MAPE %", "error %", "under %", "over %", "load below it %")
    for column in columns:
        table.add_column(column, justify="left" if column == "forecast" else "right")
    for forecaster, account in found.accounts.items():
        shares = (account.mape, found.error(forecaster), account.under, account.over,
                  account.coverage)  # fmt: skip
        table.add_row(forecaster, *(number((share or 0.0) * 100) for share in shares))
    return table


def checks_of(found: dict[str, Found]) -> list[Check]:
    worst = max(it.error(BELIEVED) / it.error(LAST) for it in found.values())
    covered = min(it.accounts[READY].coverage or 0.0 for it in found.values())
    under = max(
        (it.accounts[READY].under or 0.0) / (it.accounts[LAST].under or 1.0)
        for it in found.values()
    )
    return [
        Check(name="error of what is believed, beside the last value's", value=worst, target=LOSS,
              unit="x"),
        Check(name=f"load below the {QUANTILE:.0%} forecast, worst pool", value=covered * 100,
              target=QUANTILE * 100 - 5, unit="%", goal=Goal.AT_LEAST),
        Check(name="under-forecast of the upper quantile, beside the last value's", value=under,
              target=0.5, unit="x"),
        Check(name="time to forecast one interval", value=max(it.ms_per_step for it in
              found.values()), target=10.0, unit="ms"),
    ]  # fmt: skip


def measure(data: Path, *, quick: bool) -> Report:
    report, found = Report(title="forecast"), {}
    for name, values in pools(data / SERIES).items():
        found[name] = one = forecast(values[:QUICK_STEPS] if quick else values)
        report.tables.append(table_of(name, one))
        for forecaster in (LAST, BELIEVED):
            error = one.error(forecaster) * 100
            report.spread[f"{name}, {forecaster}, error %"] = Spread.of([error])
        chosen = ", ".join(f"{by} {n}" for by, n in one.accounts[BELIEVED].believed.items())
        report.notes.append(f"{name}: believed {chosen}")
    if quick:
        report.notes.append(f"--quick: the first {QUICK_STEPS} steps of each pool")
    report.notes.append("error: all errors over all load. MAPE is large where the load is near 0.")
    report.checks = checks_of(found)
    return report


def main() -> int:
    parser = command_line("forecast", __doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="where traces/ lies")
    asked = parser.parse_args()
    if not (asked.data / SERIES).is_file():
        print(f"{asked.data / SERIES} is not there; say with --data where it is", file=sys.stderr)
        return 2
    return measure(asked.data, quick=asked.quick).finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
