"""What a person sees of batches: bars while something moves, tables of what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from gateway import terminal
from gateway.batch.progress import KEY

_STYLES: Final = {"completed": "green", "failed": "bold red", "expired": "red"}
_LINE_EVERY: Final = 10
"""Where nobody sees a bar, every tenth look is a line."""
_MOST_PROBLEMS: Final = 20

Show = Callable[[dict[str, Any]], None]


@contextmanager
def transfer(name: str, size_bytes: int | None, told: Console) -> Iterator[Callable[[int], object]]:
    """A bar of bytes; only on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), console=told, transient=True, disable=not told.is_terminal
    ) as progress:
        task = progress.add_task(escape(name), total=size_bytes)
        yield lambda count: progress.advance(task, count)


@contextmanager
def watching(told: Console, *, quiet: bool) -> Iterator[Show]:
    if told.is_terminal and not quiet:
        with _bar(told) as show:
            yield show
        return
    looks = 0

    def show_line(batch: dict[str, Any]) -> None:
        nonlocal looks
        if not quiet and looks % _LINE_EVERY == 0:
            told.print(escape(f"{batch['id']} {batch['status']}: {in_short(batch)}"))
        looks += 1

    yield show_line


@contextmanager
def _bar(told: Console) -> Iterator[Show]:
    columns = (
        TextColumn("{task.fields[status]}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TextColumn("{task.fields[rates]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=told, transient=True) as progress:
        task = progress.add_task("", total=1, status="", rates="")

        def show(batch: dict[str, Any]) -> None:
            counts = batch["request_counts"] or {}
            progress.update(
                task,
                total=max(1, counts.get("total", 0)),
                completed=counts.get("completed", 0) + counts.get("failed", 0),
                status=batch["status"],
                rates=rates(batch),
            )

        yield show


def in_short(batch: dict[str, Any]) -> str:
    counts = batch.get("request_counts") or {}
    total, done = counts.get("total", 0), counts.get("completed", 0)
    words = f"{done:,} of {total:,} rows done"
    if failed := counts.get("failed", 0):
        words += f", {failed:,} failed"
    return f"{words}{', ' if rates(batch) else ''}{rates(batch)}"


def rates(batch: dict[str, Any]) -> str:
    told = progress_in(batch)
    if not told.get("rows_per_s"):
        return ""
    words = f"{told['rows_per_s']:,.1f} rows/s, {told['tokens_per_s']:,.0f} tokens/s"
    return f"{words}, done by {_clock(told['finish_at'])}" if told.get("finish_at") else words


def progress_in(batch: dict[str, Any]) -> dict[str, Any]:
    try:
        told = orjson.loads((batch.get("metadata") or {}).get(KEY) or b"{}")
    except (orjson.JSONDecodeError, TypeError):
        return {}
    return told if isinstance(told, dict) else {}


def show(batch: dict[str, Any]) -> None:
    out, told = terminal.console(), progress_in(batch)
    table = Table(show_header=False, box=None)
    for name, value in _facts(batch, told):
        if value:
            table.add_row(name, value)
    out.print(terminal.whole(table))
    problems = (batch.get("errors") or {}).get("data") or []
    for problem in problems[:_MOST_PROBLEMS]:
        where = f"line {problem['line']}: " if problem.get("line") else ""
        out.print(f"[red]{escape(where + str(problem['message']))}[/]", soft_wrap=True)
    if len(problems) > _MOST_PROBLEMS:
        out.print(f"and {len(problems) - _MOST_PROBLEMS:,} more: --json has them all")


def _facts(batch: dict[str, Any], told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "batch", escape(batch["id"])
    yield "status", _styled(batch["status"])
    yield "endpoint", escape(batch["endpoint"])
    yield "rows", in_short(batch)
    if told:
        yield "now", f"{told.get('running', 0):,} running, {told.get('queued', 0):,} waiting"
        yield (
            "tokens",
            (
                f"{told.get('prompt_tokens', 0):,} in ({told.get('cached_tokens', 0):,} cached), "
                f"{told.get('generated_tokens', 0):,} out, {told.get('wasted_tokens', 0):,} wasted"
            ),
        )
    yield "created", _clock(batch.get("created_at"))
    yield "window ends", _clock(batch.get("expires_at"))
    yield "output file", escape(batch.get("output_file_id") or "")
    yield "error file", escape(batch.get("error_file_id") or "")
    own = {k: v for k, v in (batch.get("metadata") or {}).items() if k != KEY}
    yield "metadata", escape(", ".join(f"{key}={value}" for key, value in own.items()))


def show_all(batches: Sequence[dict[str, Any]]) -> None:
    table = Table()
    for title in ("batch", "status", "endpoint", "rows", "failed", "created", "window ends"):
        table.add_column(title, justify="right" if title in ("rows", "failed") else "left")
    for batch in batches:
        counts = batch.get("request_counts") or {}
        table.add_row(
            escape(batch["id"]),
            _styled(batch["status"]),
            escape(batch["endpoint"]),
            f"{counts.get('completed', 0):,} of {counts.get('total', 0):,}",
            f"{counts.get('failed', 0):,}",
            _clock(batch.get("created_at")),
            _clock(batch.get("expires_at")),
        )
    terminal.console().print(terminal.whole(table))


def _styled(status: str) -> str:
    style = _STYLES.get(status)
    return f"[{style}]{escape(status)}[/]" if style else escape(status)


def _clock(unix_s: int | None) -> str:
    """In the reader's own time."""
    if not unix_s:
        return ""
    return datetime.fromtimestamp(unix_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
