"""What the next interval's load will be, and how much of it to be ready for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from types import MappingProxyType

from policies.least_squares import Products

Forecaster = Callable[[Sequence[float]], float]
"""The next value of a series that has at least one, oldest first, none of them negative."""

LAST = "last"
EWMA_WEIGHT = 0.3
HOLT_LEVEL, HOLT_TREND, HOLT_DAMPING = 0.6, 0.1, 0.9
FEWEST_POINTS = 12
"""Before this many a fit says nothing: the last value stands in, as in DOPD."""
ENOUGH_ERRORS = 20
"""Before this many a quantile of them says little."""
LARGEST_STEP = 2.0
"""A forecast is at most this many times the largest value in the window: fits may run away."""
MOST_LAGS = 3
_LONG_ORDER = 5
"""Of the autoregression whose errors stand for the noise in the moving average's fit."""


def last_value(series: Sequence[float]) -> float:
    return series[-1]


def ewma(series: Sequence[float]) -> float:
    level = series[0]
    for value in series:
        level += EWMA_WEIGHT * (value - level)
    return level


def holt(series: Sequence[float]) -> float:
    """Level and damped trend."""
    level, trend = series[0], 0.0
    for value in series[1:]:
        before, expected = level, level + HOLT_DAMPING * trend
        level = expected + HOLT_LEVEL * (value - expected)
        trend = HOLT_DAMPING * trend + HOLT_TREND * (level - before - HOLT_DAMPING * trend)
    return level + HOLT_DAMPING * trend


def arima(series: Sequence[float]) -> float:
    """ARIMA(p, d, q) by two regressions (Hannan and Rissanen 1982), its orders by AICc."""
    if len(series) < FEWEST_POINTS or max(series) == min(series):
        return series[-1]
    scale = max(series)
    scaled = [value / scale for value in series]
    steps = [after - before for before, after in pairwise(scaled)]
    level, level_score = _arma(scaled, with_mean=True)
    step, step_score = _arma(steps, with_mean=False)
    if min(level_score, step_score) == math.inf:
        return series[-1]
    return scale * (level if level_score < step_score else scaled[-1] + step)


def _arma(work: Sequence[float], *, with_mean: bool) -> tuple[float, float]:
    """The next value by the best orders, and their criterion for each point."""
    nothing = (0.0, math.inf)
    noise = _noise(work)
    if noise is None:
        return nothing
    known = [*(_lagged(work, lag) for lag in range(1, MOST_LAGS + 1)), _lagged(noise, 1)]
    products = Products([[1.0] * len(known[0]), *known, list(work[_LONG_ORDER:])])
    newest = [1.0, *(work[-lag] for lag in range(1, MOST_LAGS + 1)), noise[-1]]
    best = nothing
    for lags in range(MOST_LAGS + 1):
        for averages in (0, 1):
            chosen = [0] if with_mean else []
            chosen += range(1, lags + 1)
            chosen += [MOST_LAGS + 1] * averages
            if (fit := products.fitted(chosen)) is None:
                continue
            weights, squared = fit
            score = _aicc(squared, products.count, len(chosen) + 1)
            if score < best[1]:
                newest_chosen = (newest[column] for column in chosen)
                best = (sum(map(float.__mul__, weights, newest_chosen)), score)
    return best


def _aicc(squared: float, count: int, free: int) -> float:
    """For each point, so that a differenced series may be compared with the whole one."""
    if count <= free + 1:
        return math.inf
    correction = 2 * free * (free + 1) / (count - free - 1)
    return math.log(squared / count + 1e-12) + (2 * free + correction) / count


def _noise(work: Sequence[float]) -> list[float] | None:
    """The errors of a long autoregression, from its first one on."""
    if len(work) < 2 * _LONG_ORDER + 2:
        return None
    lags = [_lagged(work, lag) for lag in range(1, _LONG_ORDER + 1)]
    columns = [[1.0] * len(lags[0]), *lags]
    values = list(work[_LONG_ORDER:])
    fit = Products([*columns, values]).fitted(range(len(columns)))
    if fit is None:
        return None
    told = (sum(map(float.__mul__, fit[0], row)) for row in zip(*columns, strict=True))
    errors = [value - expected for value, expected in zip(values, told, strict=True)]
    return [0.0] * _LONG_ORDER + errors


def _lagged(values: Sequence[float], lag: int) -> list[float]:
    """What was so many steps before each value, from the first one that all lags reach."""
    return list(values[_LONG_ORDER - lag : len(values) - lag])


FORECAST: Mapping[str, Forecaster] = MappingProxyType(
    {LAST: last_value, "ewma": ewma, "holt": holt, "arima": arima}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One interval ahead; all zero where nothing was ever seen."""

    by: str
    """The forecaster that was believed."""
    point: float
    upper: float
    """The share `quantile` of intervals is expected to stay below."""
    last: float
    errors: Mapping[str, float]
    """Of each forecaster over the last intervals, as a share of the load."""


@dataclass(slots=True)
class _Track:
    """How one forecaster has done."""

    errors: deque[float]
    excesses: deque[float]
    """By how much the load was above the forecast, in units of `_yardstick`."""
    told: float | None = None


class Outlook:
    """One series with its forecasters: whoever has erred least of late is believed.

    Whom to believe is judged over `memory` intervals, how much to be ready for over the `recent`
    ones: loads change their kind. A value that is not a number is a gap: it teaches nothing, and
    the last known one stays.
    """

    __slots__ = ("_loads", "_recent", "_tracks", "_window", "forecasters", "margin", "quantile")

    def __init__(
        self,
        *,
        forecasters: Mapping[str, Forecaster] = FORECAST,
        quantile: float = 0.9,
        window: int = 60,
        memory: int = 100,
        recent: int = 24,
        margin: float = 0.25,
    ) -> None:
        self.forecasters = {LAST: last_value, **forecasters}
        self.quantile = quantile
        self.margin = margin
        """Readiness above the forecast, as a share, until errors have been seen."""
        self._window: deque[float] = deque(maxlen=window)
        self._recent = recent
        self._loads: deque[float] = deque(maxlen=memory)
        """Of the intervals whose errors are remembered."""
        self._tracks = {
            name: _Track(deque(maxlen=memory), deque(maxlen=recent)) for name in self.forecasters
        }

    def __len__(self) -> int:
        return len(self._window)

    def forget(self) -> None:
        """Another kind of load has begun: how the last one went says nothing of it."""
        self._window.clear()
        self._loads.clear()
        for track in self._tracks.values():
            track.errors.clear()
            track.excesses.clear()
            track.told = None

    def observe(self, value: float | None) -> None:
        """What the interval that has just ended brought."""
        if value is None or not math.isfinite(value):
            return
        value = max(0.0, value)
        if self._window:
            self._judge(value)
        self._window.append(value)
        series = list(self._window)
        ceiling = LARGEST_STEP * max(series)
        for name, track in self._tracks.items():
            forecast = self.forecasters[name](series)
            sound = forecast if math.isfinite(forecast) else value
            track.told = min(max(0.0, sound), ceiling)

    def _judge(self, value: float) -> None:
        self._loads.append(value)
        for track in self._tracks.values():
            if track.told is not None:
                track.errors.append(abs(value - track.told))
                track.excesses.append((value - track.told) / self._yardstick(track.told))

    def _yardstick(self, told: float) -> float:
        """Errors grow with the load; a forecast of nothing is measured by what is usual."""
        usual = sum(self._window) / len(self._window)
        return max(told, 0.1 * usual, 1e-9)

    def predict(self) -> Prediction:
        if not self._window:
            return Prediction(by=LAST, point=0.0, upper=0.0, last=0.0, errors={})
        errors, by = self._errors(), self._believed()
        told = self._tracks[by].told
        point = self._window[-1] if told is None else told
        upper = point + self._excess(self._tracks[by]) * self._yardstick(point)
        # A load that comes and goes errs by multiples of next to nothing: of those, no more than
        # has been seen of late, and some growth.
        highest = max(islice(reversed(self._window), self._recent))
        upper = min(upper, max(point, highest) * (1 + self.margin))
        return Prediction(
            by=by, point=point, upper=max(point, upper), last=self._window[-1], errors=errors
        )

    def _believed(self) -> str:
        """The last value, unless another has been better by more than chance would have it."""
        best, name = 0.0, LAST
        persistent = self._tracks[LAST].errors
        for other, track in self._tracks.items():
            gains = [last - own for last, own in zip(persistent, track.errors, strict=True)]
            if (lead := _lead(gains)) > best:
                best, name = lead, other
        return name

    def _errors(self) -> dict[str, float]:
        load = max(sum(self._loads), 1e-9)
        return {
            name: sum(track.errors) / load for name, track in self._tracks.items() if track.errors
        }

    def _excess(self, track: _Track) -> float:
        """The empirical quantile with its finite-sample correction (split conformal).

        While few errors are known, even ones within the margin stand in for the others: one
        surprise is then not taken for the rule.
        """
        known = len(track.excesses)
        if known >= ENOUGH_ERRORS:
            rank = min(known, math.ceil((known + 1) * self.quantile))
            return sorted(track.excesses)[rank - 1]
        steps = ENOUGH_ERRORS - known
        assumed = (self.margin * (2 * step / steps - 1) for step in range(1, steps + 1))
        ordered = sorted([*track.excesses, *assumed])
        return ordered[math.ceil(ENOUGH_ERRORS * self.quantile) - 1]


def _lead(gains: Sequence[float]) -> float:
    """The mean gain less one standard error of it."""
    count = len(gains)
    if count < FEWEST_POINTS:
        return 0.0
    mean = sum(gains) / count
    errors = [gain - mean for gain in gains]  # `** 2` would raise where a product is infinite
    variance = sum(error * error for error in errors) / (count - 1)
    return mean - math.sqrt(variance / count)
