"""What a decode step of one server takes, learnt from how fast its answers are seen to come."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import combinations
from typing import NamedTuple, Protocol

from policies.least_squares import Products

SAMPLE_US = 1_000_000
"""A pace is the mean over this long at least: tokens come in bursts."""
SAMPLES = 600
"""Ten minutes: a long context that came once is not forgotten before the next one."""
ENOUGH = 16
"""Before so many samples nothing is claimed."""
LATEST = 8
"""The line is shifted to their mean: it says what a change costs, they say where one starts."""
TELLING = 0.01
"""A term has to explain so much of the paces (rms), lest noise be taken for it."""
_COLUMNS = (0, 1, 2)


class Stream(Protocol):
    """One job at a decode server, as its books have it."""

    booked_context: int
    generated: int
    first_us: int
    """When its first token came; 0: it has not."""
    grown_us: int
    """When `generated` was told."""

    @property
    def tpot_us(self) -> int: ...


class Contexts(NamedTuple):
    """Of the answers that are under way at a server."""

    answers: int = 0
    together: int = 0
    longest: int = 0

    @classmethod
    def of(cls, streams: Collection[Stream]) -> Contexts:
        return cls.of_tokens([it.booked_context for it in streams if it.first_us])

    @classmethod
    def of_tokens(cls, tokens: Collection[int]) -> Contexts:
        return cls(len(tokens), sum(tokens), max(tokens, default=0))


class PaceLine(NamedTuple):
    """By all tokens of context, as kernels that split long contexts have it, and by the longest
    one, as others do; what is seen tells how much of each. Never negative."""

    base_us: float
    token_us: float = 0.0
    longest_us: float = 0.0

    def step_us(self, held: Contexts) -> float:
        return self.base_us + self.token_us * held.together + self.longest_us * held.longest


class Paces:
    """One answer at a time is watched; it stands for all, because all take the same steps."""

    __slots__ = ("_dirty", "_generated", "_line", "_samples", "_since_us", "watched")

    def __init__(self) -> None:
        self._samples: deque[tuple[Contexts, float]] = deque(maxlen=SAMPLES)
        self.watched: Stream | None = None
        self._since_us = self._generated = 0
        self._line: PaceLine | None = None
        self._dirty = 0

    def told(self, stream: Stream, streams: Collection[Stream], now_us: int) -> None:
        """A job of this server has got tokens."""
        if stream is not self.watched:
            if self.watched is None:
                self._watch(stream, now_us)
            return
        took_us = now_us - self._since_us
        if took_us < SAMPLE_US:
            return
        tokens = stream.generated - self._generated
        if tokens > 0 and self._generated:
            self._samples.append((Contexts.of(streams), took_us / tokens))
            self._dirty += 1
        self._watch(stream, now_us)

    def _watch(self, stream: Stream, now_us: int) -> None:
        self.watched, self._since_us, self._generated = stream, now_us, stream.generated

    def left(self, stream: Stream) -> None:
        if stream is self.watched:
            self.watched = None

    @property
    def line(self) -> PaceLine | None:
        """None until enough was seen."""
        if len(self._samples) < ENOUGH:
            return None
        if self._dirty >= LATEST or self._line is None:
            self._line, self._dirty = fitted(list(self._samples)), 0
        return self._line

    @property
    def shift_us(self) -> float:
        """What a token has taken lately beyond what the line says."""
        latest = list(self._samples)[-LATEST:]
        if (line := self._line) is None or not latest:
            return 0.0
        return sum(took - line.step_us(held) for held, took in latest) / len(latest)


def fitted(samples: list[tuple[Contexts, float]]) -> PaceLine | None:
    """The best line of which no term is negative."""
    products = Products(
        [
            [1.0] * len(samples),
            [float(held.together) for held, _ in samples],
            [float(held.longest) for held, _ in samples],
            [took_us for _, took_us in samples],
        ]
    )
    least = TELLING**2 * sum(took_us * took_us for _, took_us in samples)
    best: tuple[float, PaceLine] | None = None
    for size in _COLUMNS:
        for chosen in combinations(_COLUMNS, size + 1):
            found = products.fitted(chosen)
            if found is None or min(found[0]) < 0:
                continue
            terms = dict(zip(chosen, found[0], strict=True))
            line = PaceLine(*(terms.get(column, 0.0) for column in _COLUMNS))
            if best is None or found[1] < best[0] - least:
                best = found[1], line
    return None if best is None else best[1]
