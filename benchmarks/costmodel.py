"""How far predicted step times are from measured ones: fitted on one half, tested on the other."""

from __future__ import annotations

import argparse
import random
import sys
import time
import timeit
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from backends.step_tables import Origin, Table, read_table
from benchmarks.costmodel_crosscheck import end_to_end, splitwise
from benchmarks.costmodel_report import (
    MARKER,
    Section,
    constants_module,
    errors_section,
    findings_section,
    markdown,
    scatter_svg,
    spread_section,
    worst_section,
)
from benchmarks.report import Check, Report, Spread, add_report_options
from policies.calibration import (
    Errors,
    Sample,
    Setup,
    fit,
    relative_errors,
    solve,
    summarise,
)
from policies.constants import ANY, PEAK, Constants, Key, lookup
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import Parallel, Phase
from policies.shipped import SHIPPED, TYPICAL

SPLIT_SEED = 2026
"""Decides which half is fitted; the shipped constants saw that half only."""

STEP_TIMES = "aiconfigurator/step_times_sglang_bf16.csv.gz"
HOPPER = ("h100", "h200")
DEFAULTS_TARGET, LEFT_OUT_TARGET = 15.0, 20.0
PREDICTION_TARGET_US = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    setup: Setup
    fitted: list[Sample]
    tested: list[Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Errors on the tested half, by what made the prediction."""

    device: str
    model: str
    tp: int
    phase: Phase
    calibrated: Errors
    defaults: Errors
    family: Errors
    left_out: Errors | None
    peaks: Errors
    polynomial: Errors
    relative_polynomial: Errors


def split(origin: Origin, samples: Iterable[Sample], seed: int) -> Halves:
    """A random half of each phase to fit and the rest to test, the same for the same seed."""
    fitted: list[Sample] = []
    tested: list[Sample] = []
    rows = list(samples)
    for phase in Phase:
        group = sorted((s for s in rows if s.batch.phase is phase), key=_order)
        chance = random.Random(f"{seed}|{origin.system}|{origin.model}|{origin.tp}|{phase}")
        chosen = set(chance.sample(range(len(group)), (len(group) + 1) // 2))
        for index, sample in enumerate(group):
            (fitted if index in chosen else tested).append(sample)
    setup = Setup(
        model=model_named(origin.model),
        device=device_named(origin.system),
        parallel=Parallel(tp=origin.tp),
    )
    return Halves(setup=setup, fitted=fitted, tested=tested)


def _order(sample: Sample) -> tuple[int, int, int, float]:
    batch = sample.batch
    return batch.count, batch.new_tokens, batch.context_tokens, sample.seconds


def pooled(parts: Sequence[Halves], prior: Constants, source: str) -> Constants:
    return fit([(part.setup, part.fitted) for part in parts], prior, source=source).constants


def errors(part: Halves, constants: Constants, phase: Phase) -> Errors:
    found = summarise(relative_errors(part.setup.cost(constants), part.tested, phase))
    if found is None:
        raise ValueError(f"no {phase} points to test on {part.setup.model.name}")
    return found


def polynomial_errors(part: Halves, phase: Phase, *, relative: bool) -> Errors:
    """xLLM's predictors: TTFT by 1, n, n²; TPOT by 1, b, Σkv; plain or relative least squares."""
    fitted = [s for s in part.fitted if s.batch.phase is phase]
    rows = [_features(s) for s in fitted]
    scale = [max(row[i] for row in rows) for i in range(3)]
    weights = [1 / s.seconds if relative else 1.0 for s in fitted]
    design = [
        [w * x / u for x, u in zip(row, scale, strict=True)]
        for row, w in zip(rows, weights, strict=True)
    ]
    right = [w * s.seconds for s, w in zip(fitted, weights, strict=True)]
    normal = [[sum(r[i] * r[j] for r in design) for j in range(3)] for i in range(3)]
    values = [sum(r[i] * y for r, y in zip(design, right, strict=True)) for i in range(3)]
    solution = [c / u for c, u in zip(solve(normal, values, 0.0), scale, strict=True)]
    missed = [
        abs(sum(c * x for c, x in zip(solution, _features(s), strict=True)) / s.seconds - 1)
        for s in part.tested
        if s.batch.phase is phase
    ]
    found = summarise(missed)
    if found is None:
        raise ValueError(f"no {phase} points to test on {part.setup.model.name}")
    return found


def _features(sample: Sample) -> tuple[float, float, float]:
    batch = sample.batch
    if batch.phase is Phase.PREFILL:
        return 1.0, float(batch.new_tokens), float(batch.new_tokens) ** 2
    return 1.0, float(batch.count), float(batch.context_tokens)


def evaluate(parts: Sequence[Halves], *, baselines: bool = True) -> list[Row]:
    rows = []
    for part in parts:
        own = pooled([part], TYPICAL, "own half")
        others = _others(parts, part)
        strangers = pooled(others, TYPICAL, "other models") if others and baselines else None
        rows += [_row(part, phase, own, strangers) for phase in Phase]
    return rows


def _others(parts: Sequence[Halves], part: Halves) -> list[Halves]:
    return [
        other
        for other in parts
        if other.setup.device is part.setup.device
        and other.setup.model.name != part.setup.model.name
    ]


def _row(part: Halves, phase: Phase, own: Constants, strangers: Constants | None) -> Row:
    setup = part.setup
    device, tp = setup.device.name, setup.parallel.tp
    return Row(
        device=device,
        model=setup.model.name.rsplit("/", 1)[-1],
        tp=tp,
        phase=phase,
        calibrated=errors(part, own, phase),
        defaults=errors(part, lookup(SHIPPED, device, ANY, 0), phase),
        family=errors(part, lookup(SHIPPED, device, setup.model.family, tp), phase),
        left_out=errors(part, strangers, phase) if strangers else None,
        peaks=errors(part, PEAK, phase),
        polynomial=polynomial_errors(part, phase, relative=False),
        relative_polynomial=polynomial_errors(part, phase, relative=True),
    )


def target(row: Row) -> float:
    if row.device not in HOPPER:
        return 7.0
    return 5.0 if row.phase is Phase.PREFILL else 3.0


def checks(rows: Sequence[Row], step_us: float) -> list[Check]:
    found = [Check(name="one prediction", value=step_us, target=PREDICTION_TARGET_US, unit="us")]
    for row in rows:
        place = f"{row.device} {row.model} tp{row.tp} {row.phase}"
        found.append(_check("calibrated", place, row.calibrated, target(row)))
        found.append(_check("shipped default", place, row.defaults, DEFAULTS_TARGET))
        if row.left_out:
            found.append(_check("model unseen", place, row.left_out, LEFT_OUT_TARGET))
    return found


def _check(kind: str, place: str, missed: Errors, limit: float) -> Check:
    value = round(missed.mean * 100, 2)
    return Check(name=f"{kind}: {place}", value=value, target=limit, unit="% MAPE")


def spread(table: Table, seeds: Sequence[int]) -> dict[str, Spread]:
    """Calibrated errors over several splits, and how many rows of each miss their target."""
    runs = [
        evaluate([split(o, s, seed) for o, s in table.items()], baselines=False) for seed in seeds
    ]
    found: dict[str, Spread] = {}
    for name, devices in (("H100, H200", HOPPER), ("A100", ("a100",))):
        for phase in Phase:
            means = [
                [r.calibrated.mean * 100 for r in rows if r.device in devices and r.phase is phase]
                for rows in runs
            ]
            if all(means):
                of_rows = Spread.of(sum(run) / len(run) for run in means)
                found[f"{name} {phase}, mean of rows, %"] = of_rows
                found[f"{name} {phase}, worst row, %"] = Spread.of(max(run) for run in means)
    over = [sum(row.calibrated.mean * 100 > target(row) for row in rows) for rows in runs]
    found[f"rows over target, of {len(runs[0])}"] = Spread.of(over)
    return found


def prediction_us(part: Halves) -> float:
    """One admission decision: the step with one more sequence; the best of many short runs."""
    cost = part.setup.cost(lookup(SHIPPED, part.setup.device.name, ANY, 0))
    calls = 1000
    runs = timeit.repeat(
        lambda: cost.decode(33, 66_000).seconds,
        number=calls,
        repeat=200,
        timer=time.thread_time,
    )
    return min(runs) / calls * 1e6


def shipped_constants(parts: Sequence[Halves]) -> dict[Key, Constants]:
    """One default per device, and one per device, family and tp that begins at the default."""
    table: dict[Key, Constants] = {}
    for device in sorted({part.setup.device.name for part in parts}):
        on_device = [part for part in parts if part.setup.device.name == device]
        default = pooled(on_device, TYPICAL, _source(on_device))
        table[device, ANY, 0] = default
        groups: dict[Key, list[Halves]] = {}
        for part in on_device:
            key = (device, part.setup.model.family, part.setup.parallel.tp)
            groups.setdefault(key, []).append(part)
        for key, members in sorted(groups.items()):
            table[key] = pooled(members, default, _source(members))
    return table


def _source(parts: Sequence[Halves]) -> str:
    names = sorted(
        {f"{p.setup.model.name.rsplit('/', 1)[-1]} tp{p.setup.parallel.tp}" for p in parts}
    )
    points = sum(len(part.fitted) for part in parts)
    return f"fitted to {points} AIConfigurator 0.12 SGLang bf16 step times: {', '.join(names)}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costmodel", description=__doc__)
    parser.add_argument("--tables", type=Path, required=True, help="folder of the profile tables")
    add_report_options(parser)
    parser.add_argument("--plot", type=Path, help="write predicted against measured as SVG")
    parser.add_argument("--document", type=Path, help=f"replace what follows {MARKER} in this file")
    parser.add_argument("--write-constants", type=Path, help="fit and write the shipped constants")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    table = read_table(options.tables / STEP_TIMES)
    parts = [split(origin, samples, SPLIT_SEED) for origin, samples in table.items()]
    if options.write_constants:
        options.write_constants.write_text(constants_module(shipped_constants(parts), SPLIT_SEED))
        print(f"wrote {options.write_constants}, run again without --write-constants")
        return 0
    rows = evaluate(parts)
    splits = 2 if options.quick else 8
    report = Report(title="step times predicted for the half that was not fitted")
    report.checks += checks(rows, prediction_us(parts[0]))
    report.spread |= spread(table, range(1, splits + 1))
    report.notes.append(f"the spread is over {splits} other random halves")
    sections = [
        errors_section(rows),
        spread_section(report.spread),
        findings_section(
            "Splitwise's measurements of Llama-2-70B",
            splitwise(options.tables / "splitwise/perf_model.csv"),
        ),
        findings_section(
            "Engines end to end, TPOT in closed loops",
            end_to_end(options.tables / "aiconfigurator/silicon_e2e_dense_models.csv"),
        ),
    ]
    report.tables += [section.grid() for section in sections]
    if options.json:
        report.notes += [line for section in sections[2:] for line in section.sentences()]
    write_artefacts(options, sections, report, parts)
    return report.finish(as_json=options.json, console=Console(width=200))


def write_artefacts(
    options: argparse.Namespace,
    sections: Sequence[Section],
    report: Report,
    parts: Sequence[Halves],
) -> None:
    if options.plot:
        points = []
        for part in parts:
            cost = part.setup.cost(pooled([part], TYPICAL, "own half"))
            points += [
                (part.setup.device.name, s.batch.phase, s.seconds, cost.cost(s.batch).seconds)
                for s in part.tested
            ]
        options.plot.write_text(scatter_svg(points))
    if options.document:
        head = options.document.read_text().split(MARKER)[0]
        body = markdown([*sections, worst_section(report.checks)], str(report.machine))
        options.document.write_text(f"{head}{MARKER}\n\n{body}\n")


if __name__ == "__main__":
    sys.exit(main())
