"""How the cost model's errors are shown: text, Markdown, a plot, and the constants as a module."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.table import Table as Grid

from benchmarks.report import Check, Spread
from policies.calibration import Errors
from policies.constants import NUMBERS, Constants, Key
from policies.roofline import Phase

MARKER = "<!-- written by python -m benchmarks.costmodel -->"

HEADER = (
    "device", "model", "tp", "phase", "points", "calibrated", "p95", "shipped by family",
    "shipped default", "model unseen", "peaks only", "polynomial", "polynomial, relative",
)  # fmt: skip


class ErrorRow(Protocol):
    @property
    def device(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def tp(self) -> int: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def calibrated(self) -> Errors: ...
    @property
    def defaults(self) -> Errors: ...
    @property
    def family(self) -> Errors: ...
    @property
    def left_out(self) -> Errors | None: ...
    @property
    def peaks(self) -> Errors: ...
    @property
    def polynomial(self) -> Errors: ...
    @property
    def relative_polynomial(self) -> Errors: ...


def _cells(row: ErrorRow) -> list[str]:
    return [
        row.device,
        row.model,
        str(row.tp),
        str(row.phase),
        str(row.calibrated.count),
        f"{row.calibrated.mean:.1%}",
        f"{row.calibrated.p95:.1%}",
        f"{row.family.mean:.1%}",
        f"{row.defaults.mean:.1%}",
        f"{row.left_out.mean:.1%}" if row.left_out else "-",
        f"{row.peaks.mean:.1%}",
        f"{row.polynomial.mean:.0%}",
        f"{row.relative_polynomial.mean:.1%}",
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table that goes to the terminal and into the document."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]

    def grid(self) -> Grid:
        grid = Grid(*self.header, title=self.title, title_justify="left")
        for line in self.lines:
            grid.add_row(*line)
        return grid

    def markdown(self) -> str:
        table = [self.header, ["---"] * len(self.header), *self.lines]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in table)
        return f"### {self.title}\n\n{rows}"

    def sentences(self) -> list[str]:
        """One line for each row, for the JSON."""
        return [
            f"{self.title}: "
            + ", ".join(f"{name} {cell}" for name, cell in zip(self.header, line, strict=True))
            for line in self.lines
        ]


def errors_section(rows: Sequence[ErrorRow]) -> Section:
    ordered = sorted(rows, key=lambda row: (row.phase.value, row.device, row.model, row.tp))
    return Section(
        title="Step times, mean absolute error on the half that was not fitted",
        header=HEADER,
        lines=[_cells(row) for row in ordered],
    )


def spread_section(spread: Mapping[str, Spread]) -> Section:
    return Section(
        title="The calibrated column over other random halves",
        header=("", "lowest", "median", "highest"),
        lines=[
            [name, f"{ends.low:.3g}", f"{ends.median:.3g}", f"{ends.high:.3g}"]
            for name, ends in spread.items()
        ],
    )


def findings_section(title: str, findings: Sequence[Mapping[str, object]]) -> Section:
    return Section(
        title=title,
        header=[name.replace("_", " ") for name in findings[0]] if findings else [],
        lines=[[str(value) for value in finding.values()] for finding in findings],
    )


def worst_section(checks: Sequence[Check]) -> Section:
    """Of each kind of check and each target the one that comes closest to missing it."""
    found: dict[tuple[str, float], Check] = {}
    for check in checks:
        kind = (check.name.split(":")[0], check.target)
        if kind not in found or (check.value or 0.0) > (found[kind].value or 0.0):
            found[kind] = check
    return Section(
        title="The worst row of each kind",
        header=("check", "value", "target", "unit"),
        lines=[[c.name, f"{c.value:.3g}", f"<= {c.target:g}", c.unit] for c in found.values()],
    )


def markdown(sections: Sequence[Section], machine: str) -> str:
    return "\n\n".join([f"Measured on {machine}.", *(s.markdown() for s in sections)])


def constants_module(table: Mapping[Key, Constants], seed: int) -> str:
    lines = [
        '"""Constants fitted to step times; written by benchmarks.costmodel --write-constants.',
        "",
        f"Only the half of each table that the seed {seed} chooses was seen.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from policies.constants import Constants, Key",
        "",
        "FITTED: dict[Key, Constants] = {",
    ]
    for (device, family, tp), constants in table.items():
        lines.append(f'    ("{device}", "{family}", {tp}): Constants(')
        lines += [f"        {name}={getattr(constants, name):.4g}," for name in NUMBERS]
        lines += _wrapped_source(constants.source)
        lines.append("    ),")
    return "\n".join([*lines, "}", ""])


def _wrapped_source(source: str) -> list[str]:
    lines = textwrap.wrap(source, 80)
    quoted = [f'        "{line} "' for line in lines[:-1]] + [f'        "{lines[-1]}",']
    quoted[0] = "        source=" + quoted[0].strip()
    return quoted


Point = tuple[str, Phase, float, float]
"""Device, phase, measured and predicted seconds."""

_SIDE, _GAP, _TOP = 260, 50, 40
_COLOURS = {Phase.PREFILL: "#b5482a", Phase.DECODE: "#2a6fb5"}


def scatter_svg(points: Iterable[Point]) -> str:
    """Predicted against measured on logarithmic axes, one panel per device and phase."""
    panels: dict[tuple[Phase, str], list[tuple[float, float]]] = {}
    for device, phase, measured, predicted in points:
        panels.setdefault((phase, device), []).append((measured * 1e3, predicted * 1e3))
    columns = sorted({device for _, device in panels})
    width = _GAP + len(columns) * (_SIDE + _GAP)
    height = _TOP + len(Phase) * (_SIDE + _GAP)
    body = [
        _panel(values, phase, device, (columns.index(device), list(Phase).index(phase)))
        for (phase, device), values in sorted(panels.items())
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(
    values: Sequence[tuple[float, float]], phase: Phase, device: str, place: tuple[int, int]
) -> str:
    left, top = _GAP + place[0] * (_SIDE + _GAP), _TOP + place[1] * (_SIDE + _GAP)
    flat = [value for pair in values for value in pair]
    low, high = math.floor(math.log10(min(flat))), math.ceil(math.log10(max(flat)))

    def at(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * _SIDE

    marks = [
        f'<text x="{left}" y="{top - 8}">{device}, {phase}: predicted / measured, ms</text>',
        f'<rect x="{left}" y="{top}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#999"/>',
        f'<line x1="{left}" y1="{top + _SIDE}" x2="{left + _SIDE}" y2="{top}" stroke="#999"/>',
    ]
    for power in range(low, high + 1):
        x = at(10.0**power)
        label = f"{10.0**power:g}"
        marks.append(f'<text x="{left + x - 6:.0f}" y="{top + _SIDE + 15}">{label}</text>')
        marks.append(
            f'<text x="{left - 4}" y="{top + _SIDE - x + 4:.0f}" text-anchor="end">{label}</text>'
        )
    dots = "".join(
        f'<circle cx="{left + at(m):.1f}" cy="{top + _SIDE - at(p):.1f}" r="2"/>' for m, p in values
    )
    marks.append(f'<g fill="{_COLOURS[phase]}" fill-opacity="0.5">{dots}</g>')
    return "\n".join(marks)
