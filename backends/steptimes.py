"""How long one forward pass takes: constants, measured tables, and noise around either."""

from __future__ import annotations

import csv
import gzip
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, inf
from pathlib import Path
from typing import Protocol


class Gaussian(Protocol):
    """The part of random.Random that noise needs."""

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float: ...


class StepTimes(Protocol):
    """Seconds a forward pass takes on one server."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Of (new tokens, tokens already cached) for each sequence in the pass."""
        ...

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Of one token for each of `batch` sequences that hold `context_tokens` together."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStepTimes:
    """Constants per token; the defaults resemble Llama-3.1-8B in bf16 on one H100.

    Fitted by hand to AIConfigurator 0.12's step times for SGLang 0.5.14: decode 6.6 ms at batch 1,
    9.5 at 32 x 2k, 18.3 at 128 x 2k; prefill 22.8 ms at 1k, 206 at 8k, 1175 at 32k.
    """

    prefill_floor_s: float = 7.5e-3
    prefill_base_s: float = 0.5e-3
    prefill_token_s: float = 21.6e-6
    prefill_pair_s: float = 0.86e-9
    """For each pair of tokens that attention brings together."""
    decode_base_s: float = 6.55e-3
    decode_sequence_s: float = 2e-6
    decode_context_token_s: float = 43.5e-9

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        tokens = sum(new for new, _ in chunks)
        pairs = sum(new * (cached + new / 2) for new, cached in chunks)
        work = self.prefill_base_s + self.prefill_token_s * tokens + self.prefill_pair_s * pairs
        return max(self.prefill_floor_s, work)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return (
            self.decode_base_s
            + self.decode_sequence_s * batch
            + self.decode_context_token_s * context_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedStepTimes:
    """Constants fitted to one machine; experts are read as they are met.

    Tokens choose experts evenly and independently: a step of b sequences meets the share
    1 - (1 - k/n)^b of n experts where each token takes k.
    """

    prefill_token_s: float
    prefill_pair_s: float
    decode_base_s: float
    """Of one sequence without context."""
    decode_context_token_s: float
    decode_sequence_s: float = 0.0
    prefill_base_s: float = 0.0
    """Of each chunk, whatever is in it."""
    decode_experts_s: float = 0.0
    """What a step takes longer once every expert is met."""
    experts: int = 256
    experts_per_token: int = 8

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        tokens = sum(new for new, _ in chunks)
        pairs = sum(new * (cached + new / 2) for new, cached in chunks)
        return self.prefill_base_s + self.prefill_token_s * tokens + self.prefill_pair_s * pairs

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return (
            self.decode_base_s
            + self.decode_context_token_s * context_tokens
            + self.decode_sequence_s * (batch - 1)
            + self.decode_experts_s * _met(self.experts, self.experts_per_token, batch)
        )


@cache
def _met(experts: int, experts_per_token: int, batch: int) -> float:
    """The share of the experts that one sequence alone does not meet: asked for at each step."""
    missed = max(0.0, 1 - experts_per_token / experts)
    return 1 - missed ** max(0, batch - 1)


@dataclass(frozen=True, slots=True)
class Noisy:
    """Log-normal noise with mean 1 around another source."""

    inner: StepTimes
    random: Gaussian
    sigma: float = 0.05

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return self.inner.prefill_s(chunks) * self._factor()

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return self.inner.decode_s(batch, context_tokens) * self._factor()

    def _factor(self) -> float:
        return exp(self.random.gauss(-(self.sigma**2) / 2, self.sigma))


class Curve:
    """A line through measured points, continued straight beyond both ends."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(points)
        self._x = [x for x, _ in ordered]
        self._y = [y for _, y in ordered]

    @property
    def last_x(self) -> float:
        return self._x[-1]

    def at(self, x: float) -> float:
        slope, offset, _, _ = self.line_at(x)
        return slope * x + offset

    def line_at(self, x: float) -> tuple[float, float, float, float]:
        """The line that `x` lies on: slope, offset, and from where to where it goes."""
        if len(self._x) == 1:
            return 0.0, self._y[0], -inf, inf
        last = len(self._x) - 1
        right = min(max(bisect_right(self._x, x), 1), last)
        x0, x1, y0, y1 = self._x[right - 1], self._x[right], self._y[right - 1], self._y[right]
        slope = (y1 - y0) / (x1 - x0)
        low, high = -inf if right == 1 else x0, inf if right == last else x1
        return slope, y0 - slope * x0, low, high


@dataclass(frozen=True, slots=True)
class Row:
    """One measured pass: `batch` sequences of `context_tokens` each."""

    batch: int
    context_tokens: int
    seconds: float


_NOWHERE = (0.0, 0.0, inf, inf)


class Table:
    """Measured steps, interpolated in both directions."""

    def __init__(self, prefill: Sequence[Row], decode: Sequence[Row]) -> None:
        if not any(row.batch == 1 for row in prefill) or not decode:
            raise ValueError("a step table needs prefill rows of batch 1 and decode rows")
        self._prefill = Curve((r.context_tokens, r.seconds) for r in prefill if r.batch == 1)
        self._pair_s = self._pairing(prefill)
        self._decode_batches = sorted({row.batch for row in decode})
        self._decode = [
            Curve((r.context_tokens, r.seconds) for r in decode if r.batch == batch)
            for batch in self._decode_batches
        ]
        self._lines: dict[int, tuple[float, float, float, float]] = {}

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        """As one prompt of all new tokens, less the attention between prompts, plus that to what
        is cached. Of the measured passes with more prompts than one, all are within 1 %."""
        total = sum(new for new, _ in chunks)
        if self._pair_s:
            own = sum(new * new for new, _ in chunks)
            cached = sum(new * old for new, old in chunks)
            return self._prefill.at(total) + self._pair_s * (2 * cached + own - total * total)
        fixed = max(0.0, self._prefill.at(0))
        apart = sum(
            self._prefill.at(old + new) - (self._prefill.at(old) if old else fixed)
            for new, old in chunks
        )
        return max(self._prefill.at(total), apart)

    def _pairing(self, rows: Iterable[Row]) -> float:
        """Half the seconds that attention takes for each pair of tokens, by the passes that show
        what prompts save by not attending to each other; 0 where there are none."""
        saved, squares = 0.0, 0.0
        for row in rows:
            total = row.batch * row.context_tokens
            if row.batch > 1 and total <= self._prefill.last_x:
                apart = total * total - row.batch * row.context_tokens**2
                saved += apart * (self._prefill.at(total) - row.seconds)
                squares += apart * apart
        return max(0.0, saved / squares) if squares else 0.0

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """A running batch grows slowly: it stays on the line where it was."""
        each = context_tokens / batch
        slope, offset, low, high = self._lines.get(batch, _NOWHERE)
        if not low <= each < high:
            slope, offset, low, high = self._lines[batch] = self._line(batch, each)
        return slope * each + offset

    def _line(self, batch: int, each: float) -> tuple[float, float, float, float]:
        right = min(bisect_right(self._decode_batches, batch), len(self._decode) - 1)
        if right == 0:
            return self._decode[0].line_at(each)
        b0, b1 = self._decode_batches[right - 1], self._decode_batches[right]
        share = (batch - b0) / (b1 - b0)
        slope0, offset0, low0, high0 = self._decode[right - 1].line_at(each)
        slope1, offset1, low1, high1 = self._decode[right].line_at(each)
        slope, offset = slope0 + share * (slope1 - slope0), offset0 + share * (offset1 - offset0)
        return slope, offset, max(low0, low1), min(high0, high1)


def read_table(path: Path, *, system: str, model: str, tp: int) -> Table:
    """Read a CSV with columns system, model, tp, phase, batch_size, ctx_len, latency_ms."""
    opener = gzip.open if path.suffix == ".gz" else open
    rows: dict[str, list[Row]] = {"prefill": [], "decode": []}
    with opener(path, "rt", newline="") as lines:
        for number, line in enumerate(csv.DictReader(lines), start=2):
            try:
                if (line["system"], line["model"], line["tp"]) == (system, model, str(tp)):
                    rows[line["phase"]].append(_row(line))
            except KeyError as error:
                what = f"{path.name}, line {number}: no column or phase is called {error}"
                raise ValueError(what) from None
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from None
    if not rows["decode"]:
        raise ValueError(f"{path} holds no steps of {model} tp{tp} on {system}")
    return Table(rows["prefill"], rows["decode"])


def _row(line: Mapping[str, str]) -> Row:
    for column, kind in (("batch_size", int), ("ctx_len", int), ("latency_ms", float)):
        try:
            kind(line[column])
        except (TypeError, ValueError):
            raise ValueError(f"{column} must be a number, got {line[column]!r}") from None
    return Row(int(line["batch_size"]), int(line["ctx_len"]), float(line["latency_ms"]) / 1e3)
