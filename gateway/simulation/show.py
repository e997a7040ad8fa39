"""How a simulation's outcome looks on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway import terminal
from gateway.simulation.summary import Row, Spread

Show = Callable[[float], str]


def percent(value: float) -> str:
    return f"{value:.1%}"


def number(value: float) -> str:
    """Three significant digits where they mean something."""
    if abs(value) >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


MEASURED = (
    "TTFT percentiles: of requests that had a first token; TPOT percentiles: of answers that "
    "ended. Refused, failed and not ended ones are in neither, and have missed their targets"
)
"""Said wherever there are percentiles."""

COLUMNS: tuple[tuple[str, str, Show], ...] = (
    ("submitted", "submitted", number),
    ("refused", "rejected", number),
    ("failed", "failed", number),
    ("not ended", "unfinished", number),
    ("TTFT kept", "ttft_attained", percent),
    ("TPOT kept", "tpot_attained", percent),
    ("both kept", "attained", percent),
    ("goodput/s", "goodput_per_s", number),
    ("tokens/s", "tokens_per_s", number),
    ("wasted tok", "wasted_tokens", number),
    ("GPU-s", "gpu_s", number),
)
LATENCIES = (("TTFT ms", "ttft_ms"), ("TPOT ms", "tpot_ms"))


def cell(spread: Spread | None, show: Show) -> str:
    """The median; with it the least and the most where seeds differ."""
    if spread is None:
        return "-"
    low, median, high = show(spread.low), show(spread.median), show(spread.high)
    return median if low == high else f"{median} [dim]{low}-{high}[/]"


def quantiles(row: Row, name: str) -> str:
    """Medians over the seeds of the 50th, 90th and 99th percentile."""
    spreads = [row.metrics[f"{name}_p{share}"] for share in (50, 90, 99)]
    return " / ".join("-" if it is None else number(it.median) for it in spreads)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each load."""
    return [_table(load, rows) for load in dict.fromkeys(row.load for row in rows)]


def _table(load: float, rows: Sequence[Row]) -> Table:
    seeds = max(row.seeds for row in rows)
    counted = terminal.counted(seeds, "seed")
    title = f"load {load:g}; medians of {counted}, [dim]least-most[/]"
    table = Table(title=title, title_justify="left")
    table.add_column("policy")
    table.add_column("workload")
    for header, _ in LATENCIES:
        table.add_column(f"{header}\np50 / p90 / p99", justify="right")
    for header, _, _ in COLUMNS:
        table.add_column(header, justify="right")
    for row in rows:
        if row.load == load:
            latencies = [quantiles(row, name) for _, name in LATENCIES]
            cells = [cell(row.metrics[name], show) for _, name, show in COLUMNS]
            table.add_row(escape(row.policy), escape(row.workload), *latencies, *cells)
    return table


def show_outcome(console: Console, rows: Sequence[Row], notes: Sequence[str]) -> None:
    for table in tables(rows):
        console.print(table)
    console.print(f"Note: {MEASURED}", highlight=False)
    for note in notes:
        console.print(f"Note: {escape(note)}", highlight=False)
