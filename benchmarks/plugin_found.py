"""What a run of the plug-in's benchmark is asked to do, and what it has found so far."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field

from benchmarks.report import Check, Goal

HOLD_STEPS = 4
MOST_PARKED_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    runs: int
    quick: bool = False
    held: str = ""
    """By which shape steps are held; empty: they are not."""

    def of(self, tokens: int) -> int:
        """Quick is on shorter prompts and answers."""
        return tokens // 3 if self.quick else tokens


@dataclass(slots=True)
class Found:
    """Repetitions of each figure by its name."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


def at_least(name: str, value: float, target: float, unit: str) -> Check:
    return Check(name=name, value=value, target=target, unit=unit, goal=Goal.AT_LEAST)


def error_of(predicted: float, real: float) -> str:
    return f"{100 * (predicted / real - 1):+.0f} %" if real else "-"


def say(what: str) -> None:
    """To whoever waits."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")
