"""What is asked and when: recorded traces, and synthetic arrivals and lengths from a seed."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

TIMED = ("timestamp", "input_tokens", "output_tokens")
LENGTHS = ("input_tokens", "output_tokens")
CACHED = "cached_prefix_tokens"


class WorkloadError(ValueError):
    """A trace cannot be used; the message names the file and the line."""


class Ask(NamedTuple):
    """One request: when it comes, and how long its prompt and its answer are."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """Leading prompt tokens that somebody has sent before."""
    line: int = 0
    """Where it stands in its trace; 0: it was made up."""


class BadRow(NamedTuple):
    line: int
    why: str


@dataclass(frozen=True, slots=True)
class Trace:
    """The usable rows of a file in order of time, and those that were left out."""

    path: Path
    rows: tuple[Ask, ...]
    skipped: tuple[BadRow, ...] = ()


def read_trace(path: Path, *, skip_bad: bool = False) -> Trace:
    """A CSV, plain or gzipped, with the columns TIMED and perhaps CACHED; others are ignored."""
    return _read(path, TIMED, skip_bad=skip_bad)


def read_lengths(path: Path, *, skip_bad: bool = False) -> Trace:
    """The same without times: every row arrives at 0."""
    return _read(path, LENGTHS, skip_bad=skip_bad)


def _read(path: Path, columns: Sequence[str], *, skip_bad: bool) -> Trace:
    rows: list[Ask] = []
    skipped: list[BadRow] = []
    last_s = 0.0
    for line, row in _lines(path, columns):
        try:
            ask = _ask(row, line, last_s, timed="timestamp" in columns)
        except ValueError as error:
            if not skip_bad:
                raise WorkloadError(f"{path}, line {line}: {error}") from None
            skipped.append(BadRow(line, str(error)))
        else:
            last_s = ask.arrival_s
            rows.append(ask)
    if not rows:
        raise WorkloadError(f"{path} has no usable row ({len(skipped)} were skipped)")
    return Trace(path, tuple(rows), tuple(skipped))


def _lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise WorkloadError(
                    f"{path}, line 1: the columns {missing} are missing, "
                    f"there are {list(reader.fieldnames or ())}"
                )
            for row in reader:
                yield reader.line_num, row
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error


def _ask(row: Mapping[str, str | None], line: int, last_s: float, *, timed: bool) -> Ask:
    wanted = (*(TIMED if timed else LENGTHS), CACHED)
    if short := [name for name in wanted if name in row and row[name] is None]:
        raise ValueError(f"too few fields: the row ends before {short[0]}")
    arrival_s = _number(row, "timestamp") if timed else 0.0
    if arrival_s < 0:
        raise ValueError(f"timestamp {arrival_s:g} is negative")
    if arrival_s < last_s:
        raise ValueError(f"timestamp {arrival_s:g} comes after {last_s:g}: sort the trace by time")
    tokens = [_count(row, name, low=1) for name in LENGTHS]
    cached = _count(row, CACHED, low=0) if row.get(CACHED) else 0
    if cached > tokens[0]:
        raise ValueError(f"{CACHED} {cached} is more than the prompt's {tokens[0]}")
    return Ask(arrival_s, tokens[0], tokens[1], cached, line)


def _number(row: Mapping[str, str | None], name: str) -> float:
    try:
        value = float(row[name] or "")
    except ValueError:
        raise ValueError(f"{name} {row[name]!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} {row[name]!r} is not a finite number")
    return value


def _count(row: Mapping[str, str | None], name: str, *, low: int) -> int:
    value = _number(row, name)
    if value != int(value) or value < low:
        raise ValueError(f"{name} {row[name]!r} must be a whole number of at least {low}")
    return int(value)


class Arrivals(Protocol):
    """When requests come."""

    def times(self, random: Random) -> Iterator[float]:
        """Seconds, never decreasing, without end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent users at one mean rate."""

    rate: float

    def times(self, random: Random) -> Iterator[float]:
        now_s = 0.0
        while True:
            now_s += random.expovariate(self.rate)
            yield now_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """Gaps with a given coefficient of variation: 1 is Poisson, more is burstier."""

    rate: float
    cv: float = 2.0

    def times(self, random: Random) -> Iterator[float]:
        shape, now_s = self.cv**-2, 0.0
        while True:
            now_s += random.gammavariate(shape, 1 / (shape * self.rate))
            yield now_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Two states of exponential length; in a burst the rate is a multiple of the calm one."""

    rate: float
    """The mean over both states."""
    factor: float = 8.0
    burst_s: float = 10.0
    calm_s: float = 50.0

    def times(self, random: Random) -> Iterator[float]:
        calm_rate = self.rate * (self.burst_s + self.calm_s)
        calm_rate /= self.calm_s + self.factor * self.burst_s
        now_s, bursting = 0.0, False
        while True:
            end_s = now_s + random.expovariate(1 / (self.burst_s if bursting else self.calm_s))
            rate = calm_rate * self.factor if bursting else calm_rate
            while (now_s := now_s + random.expovariate(rate)) < end_s:
                yield now_s
            now_s, bursting = end_s, not bursting


@dataclass(frozen=True, slots=True, kw_only=True)
class Diurnal:
    """Poisson under a sine of one day, which begins at its trough."""

    rate: float
    """The mean over a day."""
    peak_to_trough: float = 4.0
    day_s: float = 86_400.0

    def times(self, random: Random) -> Iterator[float]:
        swing = (self.peak_to_trough - 1) / (self.peak_to_trough + 1)
        most = self.rate * (1 + swing)
        for at_s in Poisson(rate=most).times(random):
            rate = self.rate * (1 - swing * math.cos(2 * math.pi * at_s / self.day_s))
            if random.random() * most < rate:
                yield at_s


class Lengths(Protocol):
    """How long prompts and answers are."""

    def draw(self, random: Random) -> tuple[int, int, int]:
        """Input, output and cached tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """Independent lengths around their medians, cut off at a maximum."""

    input_median: float
    input_sigma: float
    input_max: int
    output_median: float
    output_sigma: float
    output_max: int

    def draw(self, random: Random) -> tuple[int, int, int]:
        asked = random.lognormvariate(math.log(self.input_median), self.input_sigma)
        answered = random.lognormvariate(math.log(self.output_median), self.output_sigma)
        return _within(asked, self.input_max), _within(answered, self.output_max), 0


@dataclass(frozen=True, slots=True)
class Empirical:
    """Whole rows of a trace, drawn with replacement: input and output stay together."""

    rows: Sequence[Ask]

    def draw(self, random: Random) -> tuple[int, int, int]:
        row = self.rows[random.randrange(len(self.rows))]
        return row.input_tokens, row.output_tokens, row.cached_tokens


def _within(tokens: float, most: int) -> int:
    return max(1, min(round(tokens), most))


def synthetic(
    arrivals: Arrivals, lengths: Lengths, *, until_s: float, random: Random
) -> Iterator[Ask]:
    """Times and lengths come from generators of their own: more of one never moves the other."""
    clock, sizes = Random(random.getrandbits(64)), Random(random.getrandbits(64))
    for at_s in arrivals.times(clock):
        if at_s >= until_s:
            return
        asked, answered, cached = lengths.draw(sizes)
        yield Ask(at_s, asked, answered, cached)


def replayed(
    rows: Iterable[Ask],
    *,
    from_s: float = 0.0,
    until_s: float = math.inf,
    rate_scale: float = 1.0,
    tick_s: float = 0.0,
    random: Random,
) -> list[Ask]:
    """A window of a trace, faster or slower; times told in ticks are spread over their tick."""
    window = [row for row in rows if row.arrival_s >= from_s]
    moved = [
        row._replace(arrival_s=(row.arrival_s - from_s + random.uniform(0, tick_s)) / rate_scale)
        if tick_s
        else row._replace(arrival_s=(row.arrival_s - from_s) / rate_scale)
        for row in window
    ]
    moved.sort(key=lambda row: row.arrival_s)
    return [row for row in moved if row.arrival_s < until_s]
