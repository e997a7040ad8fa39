"""How a table of measured step times is read."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from policies.calibration import Sample
from policies.roofline import Batch, Phase, decode_batch, prefill_batch

T = TypeVar("T", int, float)
COLUMNS = ("phase", "batch_size", "ctx_len", "latency_ms")


class TableError(ValueError):
    pass


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Origin:
    """What a row was measured on; fields are empty, or 0, where the table does not say."""

    system: str = ""
    model: str = ""
    tp: int = 0
    dtype: str = ""


Table = dict[Origin, list[Sample]]


def read_table(path: Path) -> Table:
    """Reads a CSV, plain or gzipped: phase, batch_size, ctx_len, latency_ms [, cached_len, ...]."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", newline="") as lines:
            return _read(lines, path.name)
    with path.open("rt", newline="") as lines:
        return _read(lines, path.name)


def _read(lines: Iterable[str], name: str) -> Table:
    table: Table = {}
    reader = csv.DictReader(lines)
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise TableError(f"{name} lacks the columns {missing}")
    for number, row in enumerate(reader, start=2):
        try:
            table.setdefault(_origin(row), []).append(_sample(row))
        except (TypeError, ValueError) as error:
            raise TableError(f"{name}, line {number}: {error}") from error
    if not table:
        raise TableError(f"{name} has no rows")
    return table


def _origin(row: Mapping[str, str]) -> Origin:
    return Origin(
        system=row.get("system") or "",
        model=row.get("model") or "",
        tp=_number(row, "tp", int, "0"),
        dtype=row.get("dtype") or "",
    )


def _sample(row: Mapping[str, str]) -> Sample:
    count, length = _number(row, "batch_size", int), _number(row, "ctx_len", int)
    if count < 1 or length < 1:
        raise ValueError(f"a batch of {count} with {length} tokens is none")
    milliseconds = _number(row, "latency_ms", float)
    return Sample(batch=_batch(row, count, length), seconds=milliseconds * 1e-3)


def _number(row: Mapping[str, str], column: str, kind: Callable[[str], T], absent: str = "") -> T:
    """Whoever mends a table has to know which cell is meant."""
    cell = row.get(column) or absent
    try:
        return kind(cell)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{column} must be {wanted}, got {cell!r}") from None


def _batch(row: Mapping[str, str], count: int, length: int) -> Batch:
    if row["phase"] not in set(Phase):
        raise ValueError(f"phase must be one of {', '.join(Phase)}, got {row['phase']!r}")
    if Phase(row["phase"]) is Phase.DECODE:
        return decode_batch(count, count * length)
    return prefill_batch([(length, _number(row, "cached_len", int, "0"))] * count)
