"""How the cost model's errors are shown: text, Markdown, a plot, and the constants as a module."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

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


def _ordered(rows: Sequence[ErrorRow]) -> list[ErrorRow]:
    return sorted(rows, key=lambda row: (row.phase.value, row.device, row.model, row.tp))


def _aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def _piped(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _findings(findings: Sequence[Mapping[str, object]]) -> tuple[list[str], list[list[str]]]:
    header = list(findings[0]) if findings else []
    return header, [[str(value) for value in finding.values()] for finding in findings]


def text(rows: Sequence[ErrorRow], result: Mapping[str, Any]) -> str:
    failed = [check["name"] for check in result["checks"] if not check["ok"]]
    parts = [
        _aligned(HEADER, [_cells(row) for row in _ordered(rows)]),
        f"Calibrated errors over other splits, lowest and highest, %: {result['spread']}",
        "Splitwise, Llama-2-70B:",
        _aligned(*_findings(result["crosscheck"]["splitwise"])),
        "Engines end to end, TPOT:",
        _aligned(*_findings(result["crosscheck"]["end_to_end"])),
        f"{len(result['checks'])} checks, {len(failed)} fell short {failed or ''}",
    ]
    return "\n\n".join(parts)


def markdown(rows: Sequence[ErrorRow], result: Mapping[str, Any]) -> str:
    spread = [[name, *map(str, ends)] for name, ends in result["spread"].items()]
    worst = [[c["name"], str(c["value"]), c["target"], c["unit"]] for c in _worst(result["checks"])]
    parts = [
        f"Measured on {result['date']}, {result['machine']}.",
        "### Step times, mean absolute error on the half that was not fitted",
        _piped(HEADER, [_cells(row) for row in _ordered(rows)]),
        "### The worst row of each kind",
        _piped(("check", "value", "target", "unit"), worst),
        "### The calibrated column over eight other random halves, in %",
        _piped(("rows", "lowest", "highest"), spread),
        "### Splitwise's measurements of Llama-2-70B",
        _piped(*_findings(result["crosscheck"]["splitwise"])),
        "### Engines end to end, TPOT in closed loops",
        _piped(*_findings(result["crosscheck"]["end_to_end"])),
    ]
    return "\n\n".join(parts)


def _worst(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for check in checks:
        kind = (" ".join(check["name"].split()[:2]), check["target"])
        if kind not in found or check["value"] > found[kind]["value"]:
            found[kind] = check
    return list(found.values())


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
