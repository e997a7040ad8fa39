"""Which constants explain measured step times: least squares on logarithms, with a prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from policies.constants import BOUNDS, NUMBERS, Constants
from policies.devices import Device
from policies.models import Model
from policies.roofline import Batch, CostModel, Parallel, Phase, build, decode_batch, prefill_batch

FEWEST_SAMPLES = 6
"""Per phase; with fewer the prior would speak, not the measurements."""

WORST_MEDIAN_ERROR = 0.30
"""A fit that misses its own samples by more than this explains nothing."""

PRIOR_WEIGHT = 0.05
"""One natural logarithm away from the prior costs as much as a sample missed by 5 %."""


class CalibrationError(ValueError):
    """The measurements cannot be explained, and the message says why."""


class TooFew(CalibrationError):
    """There are not enough of them to be explained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured step."""

    batch: Batch
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What was measured: one model on one device, spread in one way."""

    model: Model
    device: Device
    parallel: Parallel

    def cost(self, constants: Constants) -> CostModel:
        return build(self.model, self.device, constants, self.parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of predictions."""

    count: int
    mean: float
    median: float
    p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    constants: Constants
    prefill: Errors | None
    decode: Errors | None


Measured = tuple[Setup, Sequence[Sample]]
Vector = list[float]
Bound = tuple[float, float]


def summarise(relative: Sequence[float]) -> Errors | None:
    """The 95th percentile is interpolated as numpy does; nothing to summarise gives None."""
    if not relative:
        return None
    ordered = sorted(relative)
    return Errors(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        median=_quantile(ordered, 0.5),
        p95=_quantile(ordered, 0.95),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def relative_errors(cost: CostModel, samples: Sequence[Sample], phase: Phase) -> Vector:
    return [
        abs(cost.cost(sample.batch).seconds / sample.seconds - 1)
        for sample in samples
        if sample.batch.phase is phase
    ]


def samples_from_timings(
    prefills: Iterable[tuple[int, float]], decodes: Iterable[tuple[int, int, float]]
) -> list[Sample]:
    """From (prompt tokens, seconds) and (sequences, context tokens of all, seconds)."""
    return [
        *(Sample(batch=prefill_batch([(n, 0)]), seconds=seconds) for n, seconds in prefills),
        *(Sample(batch=decode_batch(n, c), seconds=seconds) for n, c, seconds in decodes),
    ]


def fit(
    measured: Sequence[Measured], prior: Constants, *, source: str, weight: float = PRIOR_WEIGHT
) -> Fit:
    """Constants that fit all the measurements; those that they say nothing about stay as before."""
    _check_samples([sample for _, samples in measured for sample in samples])
    bounds = [(math.log(low), math.log(high)) for low, high in map(BOUNDS.__getitem__, NUMBERS)]
    centre = [
        _inside(math.log(max(getattr(prior, name), 1e-9)), bound)
        for name, bound in zip(NUMBERS, bounds, strict=True)
    ]

    def constants(vector: Vector) -> Constants:
        numbers = {name: math.exp(value) for name, value in zip(NUMBERS, vector, strict=True)}
        return replace(prior, source=source, **numbers)

    def residuals(vector: Vector) -> Vector:
        trial = constants(vector)
        result = [weight * (x - c) for x, c in zip(vector, centre, strict=True)]
        for setup, samples in measured:
            cost = setup.cost(trial)
            result += [math.log(cost.cost(s.batch).seconds / s.seconds) for s in samples]
        return result

    return _judge(constants(least_squares(residuals, centre, bounds)), measured)


def held_out(setup: Setup, samples: Sequence[Sample], prior: Constants) -> dict[Phase, Errors]:
    """How well constants carry to steps they were not fitted to: each half predicts the other."""
    ordered = sorted(samples, key=lambda s: (s.batch.phase, s.batch.count, s.batch.pairs))
    first, second = ordered[::2], ordered[1::2]
    missed: dict[Phase, Vector] = {phase: [] for phase in Phase}
    for fitted, tested in ((first, second), (second, first)):
        cost = setup.cost(fit([(setup, fitted)], prior, source="half").constants)
        for phase in Phase:
            missed[phase] += relative_errors(cost, tested, phase)
    found = {phase: summarise(relative) for phase, relative in missed.items()}
    return {phase: errors for phase, errors in found.items() if errors}


def _inside(value: float, bound: Bound) -> float:
    return min(bound[1], max(bound[0], value))


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise TooFew("no samples at all")
    for sample in samples:
        if not math.isfinite(sample.seconds) or sample.seconds <= 0:
            raise CalibrationError(f"a step took {sample.seconds} s, which is no time: {sample}")
    for phase in Phase:
        of_phase = [s for s in samples if s.batch.phase is phase]
        if not of_phase:
            continue
        if len(of_phase) < FEWEST_SAMPLES:
            raise TooFew(
                f"{len(of_phase)} {phase} samples are too few, at least {FEWEST_SAMPLES} are needed"
            )
        work = {(s.batch.new_tokens, s.batch.context_tokens, s.batch.pairs) for s in of_phase}
        if len(work) < 3:
            raise TooFew(
                f"the {phase} samples cover {len(work)} different loads, at least 3 are needed"
            )


def _judge(constants: Constants, measured: Sequence[Measured]) -> Fit:
    errors: dict[Phase, Errors | None] = {}
    for phase in Phase:
        relative = [
            error
            for setup, samples in measured
            for error in relative_errors(setup.cost(constants), samples, phase)
        ]
        found = summarise(relative)
        if found and found.median > WORST_MEDIAN_ERROR:
            raise CalibrationError(
                f"the best fit misses half of the {phase} samples by more than "
                f"{found.median:.0%}: wrong model, device or tp, or times that are not step times"
            )
        errors[phase] = found
    return Fit(constants=constants, prefill=errors[Phase.PREFILL], decode=errors[Phase.DECODE])


def least_squares(
    residuals: Callable[[Vector], Vector],
    start: Vector,
    bounds: Sequence[Bound],
    *,
    iterations: int = 60,
) -> Vector:
    """Levenberg and Marquardt inside bounds; steps of at most one unit, as unknowns are logs."""
    point, damping = list(start), 1e-2
    current = residuals(point)
    cost = _square(current)
    for _ in range(iterations):
        normal, gradient = _normal_equations(residuals, point, current, bounds)
        _hold_at_bounds(normal, gradient, point, bounds)
        before = cost
        while damping < 1e8:
            step = solve(normal, gradient, damping)
            trial = [
                _inside(x + max(-1.0, min(1.0, d)), bound)
                for x, d, bound in zip(point, step, bounds, strict=True)
            ]
            tried = residuals(trial)
            if _square(tried) < cost:
                point, current, cost = trial, tried, _square(tried)
                damping = max(damping / 5, 1e-9)
                break
            damping *= 4
        if before - cost <= 1e-6 * before:
            break
    return point


def _square(values: Vector) -> float:
    return sum(value * value for value in values)


def _normal_equations(
    residuals: Callable[[Vector], Vector],
    point: Vector,
    current: Vector,
    bounds: Sequence[Bound],
) -> tuple[list[Vector], Vector]:
    columns = []
    for index, (_, high) in enumerate(bounds):
        width = 1e-5 if point[index] + 1e-5 <= high else -1e-5
        moved = list(point)
        moved[index] += width
        shifted = residuals(moved)
        columns.append([(a - b) / width for a, b in zip(shifted, current, strict=True)])
    normal = [[sum(map(float.__mul__, left, right)) for right in columns] for left in columns]
    gradient = [-sum(map(float.__mul__, column, current)) for column in columns]
    return normal, gradient


def _hold_at_bounds(
    normal: list[Vector], gradient: Vector, point: Vector, bounds: Sequence[Bound]
) -> None:
    """Takes an unknown out of the equations where it could only leave its bounds."""
    for index, (low, high) in enumerate(bounds):
        pushed_out = (point[index] >= high and gradient[index] > 0) or (
            point[index] <= low and gradient[index] < 0
        )
        if pushed_out:
            gradient[index] = 0.0
            for other in range(len(point)):
                normal[index][other] = normal[other][index] = 0.0
            normal[index][index] = 1.0


def solve(matrix: list[Vector], right: Vector, damping: float) -> Vector:
    """Gaussian elimination of (matrix + damping·1)·x = right; the matrix is never singular."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for index, row in enumerate(rows):
        row[index] += damping
    for pivot in range(size):
        best = max(range(pivot, size), key=lambda r: abs(rows[r][pivot]))
        rows[pivot], rows[best] = rows[best], rows[pivot]
        for below in range(pivot + 1, size):
            factor = rows[below][pivot] / rows[pivot][pivot]
            rows[below] = [a - factor * b for a, b in zip(rows[below], rows[pivot], strict=True)]
    solution = [0.0] * size
    for index in reversed(range(size)):
        known = sum(rows[index][j] * solution[j] for j in range(index + 1, size))
        solution[index] = (rows[index][size] - known) / rows[index][index]
    return solution


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeMoments:
    """A server's running sums over its decode steps: [n, Σb, Σt, Σb², Σbt, Σgenerated], t in us."""

    steps: float
    batch: float
    time_us: float
    batch_squared: float
    batch_time_us: float
    generated: float

    def since(self, before: DecodeMoments) -> DecodeMoments:
        """What happened in between; a server that started anew is refused."""
        if self.steps < before.steps:
            raise CalibrationError("the decode moments went backwards: the server has restarted")
        return DecodeMoments(
            steps=self.steps - before.steps,
            batch=self.batch - before.batch,
            time_us=self.time_us - before.time_us,
            batch_squared=self.batch_squared - before.batch_squared,
            batch_time_us=self.batch_time_us - before.batch_time_us,
            generated=self.generated - before.generated,
        )


def sample_from_moments(window: DecodeMoments, mean_context_tokens: float) -> Sample:
    """The mean step of a window; contexts come from the gateway's books, as servers do not say."""
    if window.steps < 1 or window.batch < window.steps:
        raise CalibrationError(f"a window of {window.steps:.0f} decode steps has no mean step")
    count = window.batch / window.steps
    return Sample(
        batch=decode_batch(round(count), round(count * mean_context_tokens)),
        seconds=window.time_us / window.steps * 1e-6,
    )


def line_from_moments(window: DecodeMoments) -> tuple[float, float]:
    """Seconds of an empty step and seconds per sequence, as far as the batch size varied."""
    n = window.steps
    spread = n * window.batch_squared - window.batch * window.batch
    if n < 2 or spread <= 0.05 * window.batch * window.batch / n:
        raise CalibrationError("the batch size hardly varied: no line through these decode steps")
    slope = (n * window.batch_time_us - window.batch * window.time_us) / spread
    intercept = (window.time_us - slope * window.batch) / n
    if slope < 0 or intercept < 0:
        raise CalibrationError(
            f"decode steps of {intercept:.0f} us plus {slope:.1f} us per sequence make no sense"
        )
    return intercept * 1e-6, slope * 1e-6
