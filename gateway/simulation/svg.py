"""Small plots as inline SVG: lines and stacked bars, readable without any script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 28, 40
COLOURS = ("#2563a8", "#d1691f", "#2f8a4c", "#a23b72", "#6b5bb5", "#8a7a2f", "#3a9ca6", "#777777")
DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    label: str
    low: float
    high: float
    logarithmic: bool = False
    percent: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        value = min(max(value, self.low), self.high)
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = [10.0**power for power in range(first, last + 1)]
            return [it for it in powers if self.low <= it <= self.high * 1.0001]
        step = _round_step((self.high - self.low) / 5)
        first_tick = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first_tick, math.floor(self.high / step + 1e-9) + 1)]

    def text(self, value: float) -> str:
        return f"{value * 100:.0f} %" if self.percent else f"{value:,.6g}"


def axis(label: str, values: Sequence[float], *, from_zero: bool = True) -> Axis:
    """Linear, as wide as the values."""
    low = 0.0 if from_zero else min(values, default=0.0)
    high = max(values, default=1.0)
    return Axis(label=label, low=low, high=high if high > low else low + 1)


def log_axis(label: str, values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=10.0)
    return Axis(label=label, low=low, high=max(high, low * 1.1), logarithmic=True)


def plot(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    body = [_frame(x, y)]
    for line in lines:
        points = " ".join(f"{_x(x, at):.1f},{_y(y, value):.1f}" for at, value in line.points)
        dash = f' stroke-dasharray="{DASHES[line.dash % len(DASHES)]}"' if line.dash else ""
        colour = COLOURS[line.colour % len(COLOURS)]
        body.append(f'<polyline points="{points}" stroke="{colour}"{dash} class="line"/>')
        if len(line.points) == 1:
            at, value = line.points[0]
            place = f'cx="{_x(x, at):.1f}" cy="{_y(y, value):.1f}" r="3.5"'
            body.append(f'<circle {place} fill="{colour}"/>')
    legend = [(line.name, COLOURS[line.colour % len(COLOURS)]) for line in lines]
    return _figure(title, "".join(body), HEIGHT, legend)


def bars(
    title: str,
    label: str,
    names: Sequence[str],
    parts: Sequence[str],
    values: Sequence[Sequence[float]],
) -> str:
    """One horizontal bar for each name, made of its parts."""
    height = TOP + BOTTOM + 30 * max(1, len(names))
    across = axis(label, [sum(row) for row in values])
    body = [_bottom(across, height)]
    for i, (name, row) in enumerate(zip(names, values, strict=True)):
        y, start = TOP + 30 * i + 12, 0.0
        body.append(_text(LEFT, y - 2, name, "start"))
        for j, value in enumerate(row):
            left, right = _x(across, start), _x(across, start + value)
            start += value
            place = f'x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="13"'
            body.append(f'<rect {place} fill="{COLOURS[j % len(COLOURS)]}"/>')
    legend = [(part, COLOURS[j % len(COLOURS)]) for j, part in enumerate(parts)]
    return _figure(title, "".join(body), height, legend)


def _frame(x: Axis, y: Axis) -> str:
    parts = [_bottom(x, HEIGHT), _text(LEFT, TOP - 10, y.label, "start")]
    for tick in y.ticks():
        at = _y(y, tick)
        parts.append(_rule(LEFT, WIDTH - RIGHT, at, at))
        parts.append(_text(LEFT - 6, at + 4, y.text(tick), "end"))
    return "".join(parts)


def _bottom(x: Axis, height: int) -> str:
    parts = [_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x.label)]
    for tick in x.ticks():
        at = _x(x, tick)
        parts.append(_rule(at, at, TOP, height - BOTTOM))
        parts.append(_text(at, height - BOTTOM + 14, x.text(tick)))
    return "".join(parts)


def _rule(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" class="grid"/>'


def _figure(title: str, body: str, height: int, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in legend
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
        f'<div class="legend">{keys}</div></figure>'
    )


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, not less than asked for."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)
