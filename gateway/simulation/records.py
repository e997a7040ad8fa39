"""What is kept of each request, and the log from which every figure can be computed again."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from policies.types import Kind

REQUESTS, RUNS = "requests.csv", "runs.csv"


class Ended(StrEnum):
    FINISHED = "finished"
    REJECTED = "rejected"
    """Answered without having been served."""
    FAILED = "failed"
    UNFINISHED = "unfinished"
    """Still waiting or running when the simulation ended."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One request; times are microseconds from the start, None where it never came to that."""

    id: str
    workload: str
    kind: Kind
    arrival_us: int
    prompt_tokens: int
    output_tokens: int
    """The true length of its answer, which no policy saw."""
    ttft_target_us: int
    tpot_target_us: int
    window_us: int
    ended: Ended = Ended.UNFINISHED
    reason: str = ""
    attempts: int = 0
    prefill: str = ""
    decode: str = ""
    dispatched_us: int | None = None
    """First given to servers."""
    sent_us: int | None = None
    """Last given to servers."""
    began_us: int | None = None
    """A server began to compute the prompt."""
    computed_us: int | None = None
    first_us: int | None = None
    last_us: int | None = None
    generated: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    """Prompt tokens that servers computed for it, those computed again included."""
    preemptions: int = 0
    lost_tokens: int = 0
    """Generated, and thrown away by a preemption."""

    @property
    def has_finished(self) -> bool:
        return self.ended is Ended.FINISHED

    @property
    def ttft_us(self) -> int | None:
        return None if self.first_us is None else self.first_us - self.arrival_us

    @property
    def tpot_us(self) -> float | None:
        """None where there is no second token."""
        if self.first_us is None or self.last_us is None or self.generated < 2:
            return None
        return (self.last_us - self.first_us) / (self.generated - 1)

    @property
    def keeps_ttft(self) -> bool:
        ttft_us = self.ttft_us
        return self.has_finished and ttft_us is not None and ttft_us <= self.ttft_target_us

    @property
    def keeps_tpot(self) -> bool:
        """An answer of one token keeps it by ending."""
        return self.has_finished and (self.tpot_us or 0.0) <= self.tpot_target_us

    @property
    def keeps_all(self) -> bool:
        """Online: both targets. Offline: the window."""
        if self.kind is Kind.ONLINE:
            return self.keeps_ttft and self.keeps_tpot
        return self.last_us is not None and self.has_finished and self._age_us <= self.window_us

    @property
    def _age_us(self) -> int:
        return (self.last_us or 0) - self.arrival_us

    @property
    def wasted_tokens(self) -> int:
        """Computed for nothing: prompts computed again, and all of what ended without an answer."""
        again = max(0, self.computed_tokens - (self.prompt_tokens - self.cached_tokens))
        if self.ended in (Ended.REJECTED, Ended.FAILED):
            return self.computed_tokens + self.generated + self.lost_tokens
        return again + self.lost_tokens

    def tokens_between(self, start_us: int, end_us: int) -> float:
        """Of an answer that did not fail, spread evenly from its first token to its last."""
        if self.first_us is None or self.last_us is None or self.ended is Ended.FAILED:
            return 0.0
        if self.last_us <= self.first_us:
            return float(self.generated) if start_us <= self.first_us < end_us else 0.0
        inside = min(self.last_us, end_us) - max(self.first_us, start_us)
        return self.generated * max(0, inside) / (self.last_us - self.first_us)

    def parts_us(self) -> tuple[int, ...]:
        """Where a finished request's time went, in the order of PARTS; together it is all of it."""
        if self.dispatched_us is None or self.first_us is None or self.last_us is None:
            return ()
        marks = [self.arrival_us]
        for mark in (self.dispatched_us, self.sent_us, self.began_us, self.computed_us):
            known = marks[-1] if mark is None else mark
            marks.append(max(marks[-1], min(known, self.first_us)))
        marks += (self.first_us, self.last_us)
        return tuple(after - before for before, after in pairwise(marks))


PARTS = (
    "waiting in the gateway",
    "lost to retries",
    "waiting at a server",
    "prefill",
    "transfer and decode entry",
    "decode",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the figures of one run need beside its requests."""

    policy: str
    load: float
    seed: int
    from_us: int
    """Online requests that come from here on count."""
    until_us: int
    """Arrivals end."""
    ended_us: int
    gpu_s: float
    requests: int
    skipped_rows: int = 0
    """Of traces, because they make no request."""
    too_large: int = 0
    """Left out because no server could hold them."""
    cut_answers: int = 0
    """Longer than the limit that their request names, and ended there."""
    switched: int = 0
    """Roles that servers have changed."""
    launched: int = 0
    """Parked servers that were started."""
    released: int = 0
    """Servers that were given back."""


Log = Sequence[tuple[RunFacts, Sequence[Record]]]
KEYS = ("policy", "load", "seed")


class LogWriter:
    """requests.csv and runs.csv in one folder, written as runs end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._requests = (folder / REQUESTS).open("w", newline="", encoding="utf-8")
        self._runs = (folder / RUNS).open("w", newline="", encoding="utf-8")
        self._row = csv.writer(self._requests, lineterminator="\n")
        self._run = csv.writer(self._runs, lineterminator="\n")
        self._row.writerow([*KEYS, *names(Record)])
        self._run.writerow(names(RunFacts))

    def write(self, facts: RunFacts, records: Iterable[Record]) -> None:
        run = [getattr(facts, key) for key in KEYS]
        columns = names(Record)
        self._run.writerow([getattr(facts, name) for name in names(RunFacts)])
        self._row.writerows([*run, *(getattr(it, name) for name in columns)] for it in records)

    def close(self) -> list[Path]:
        """The files; a Parquet copy is among them where pyarrow is there to write it."""
        try:
            self._requests.close()
        finally:
            self._runs.close()
        files = [self._folder / REQUESTS, self._folder / RUNS]
        if find_spec("pyarrow") is not None:
            tables = importlib.import_module("pyarrow.csv")
            parquet = importlib.import_module("pyarrow.parquet")
            files.append(self._folder / "requests.parquet")
            parquet.write_table(tables.read_csv(files[0]), files[-1])
        return files


def read_log(folder: Path) -> Iterator[tuple[RunFacts, list[Record]]]:
    """Run by run, as they were written."""
    runs: list[RunFacts] = [_typed(RunFacts, row) for row in _rows(folder / RUNS)]
    requests = _rows(folder / REQUESTS)
    for facts in runs:
        rows = (next(requests) for _ in range(facts.requests))
        yield facts, [_typed(Record, row) for row in rows]


def names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls)]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        yield from csv.DictReader(lines)


def _typed(cls: Any, row: dict[str, str]) -> Any:
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], row[name]) for name in names(cls)})


def _value(wanted: Any, text: str) -> Any:
    if wanted == (int | None):
        return int(text) if text else None
    return wanted(text)
