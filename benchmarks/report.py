"""How every benchmark ends: a table of checks, one JSON line, an exit code.

report = Report(title="what was measured")
report.spread["decision, us"] = Spread.of(samples)
report.checks.append(Check(name="decision p99", value=181.0, target=200.0, unit="us"))
sys.exit(report.finish(as_json=arguments.json))
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.machine import Machine, this_machine

PIPE_COLUMNS = 140
"""A file is read by scrolling: nothing in it is cut to the width of a screen."""


class Goal(StrEnum):
    AT_MOST = "at_most"
    AT_LEAST = "at_least"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One promise and what was measured; what was not measured (None) is not kept."""

    name: str
    value: float | None
    target: float
    unit: str
    goal: Goal = Goal.AT_MOST

    @property
    def ok(self) -> bool:
        if self.value is None or self.value != self.value:
            return False
        kept = self.value <= self.target
        return kept if self.goal is Goal.AT_MOST else self.value >= self.target

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "target": self.target,
            "unit": self.unit,
            "goal": self.goal,
            "ok": self.ok,
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """The least, the median and the most of repeated measurements."""

    low: float
    median: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            raise ValueError("nothing was measured")
        return cls(ordered[0], statistics.median(ordered), ordered[-1], len(ordered))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}-{number(self.high)})"


def number(value: float) -> str:
    """Three significant digits, without an exponent and without false precision."""
    if value != 0 and abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


@dataclass(slots=True)
class Report:
    """What a benchmark found; filled while it runs, printed once."""

    title: str
    checks: list[Check] = field(default_factory=list)
    spread: dict[str, Spread] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: Machine = field(default_factory=this_machine)

    @property
    def exit_code(self) -> int:
        """A command that checked nothing has nothing to fail."""
        return 0 if all(check.ok for check in self.checks) else 1

    def as_json(self, *, date: str) -> bytes:
        return orjson.dumps(
            {
                "title": self.title,
                "checks": [check.as_dict() for check in self.checks],
                "spread": {name: dataclasses.asdict(it) for name, it in self.spread.items()},
                "notes": self.notes,
                "machine": dataclasses.asdict(self.machine),
                "date": date,
            }
        )

    def finish(self, *, as_json: bool, console: Console | None = None) -> int:
        """Print everything; the JSON object, when asked for, is the last line."""
        console = console or Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
        for table in (*self.tables, *([checks_table(self.checks)] if self.checks else [])):
            console.print(table)
        for note in self.notes:
            console.print(f"Note: {escape(note)}")
        date = datetime.now(UTC).date().isoformat()
        console.print(f"{escape(str(self.machine))}; {date}", style="dim")
        if as_json:
            console.file.write(self.as_json(date=date).decode() + "\n")
            console.file.flush()
        return self.exit_code


def checks_table(checks: Iterable[Check]) -> Table:
    table = Table(title="Checks", title_justify="left")
    for column in ("check", "measured", "target", ""):
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    for check in checks:
        bound = "<=" if check.goal is Goal.AT_MOST else ">="
        measured = "not measured" if check.value is None else f"{number(check.value)} {check.unit}"
        verdict = "[green]kept[/]" if check.ok else "[bold red]missed[/]"
        target = f"{bound} {check.target:g} {check.unit}"
        table.add_row(escape(check.name), measured, target, verdict)
    return table


def command_line(name: str, about: str | None) -> argparse.ArgumentParser:
    """What every benchmark's command line begins with."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report_options(parser)
    return parser


def reported(measure: Callable[[], Report], *known: type[Exception], as_json: bool) -> int:
    """The exit code: 1 when a check falls short, 2 when nothing could be measured."""
    try:
        report = measure()
    except known as problem:
        print(problem, file=sys.stderr)
        return 2
    return report.finish(as_json=as_json)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """The two options that every benchmark has."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="end with one JSON object on the last line: checks, spread, machine, date",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer and shorter runs, done within a minute; the output says what was shortened",
    )
