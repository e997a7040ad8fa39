"""What a prompt is to the cache: token ids, or only names and lengths where nobody needs ids."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from backends.engine.tokens import pack


class Prompt(Protocol):
    """A sequence of tokens that can be cut, compared and continued."""

    @property
    def tokens(self) -> int: ...

    def cut(self, start: int, end: int) -> Self: ...

    def common(self, other: Self) -> int:
        """The number of leading tokens that both share."""
        ...

    def head(self, tokens: int) -> Hashable:
        """What tells two prompts apart in their first tokens."""
        ...

    def grown(self, output: list[int] | int) -> Self:
        """With generated tokens at the end; their number is enough where there are no ids."""
        ...

    def seed(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids, four bytes each."""

    packed: bytes

    @property
    def tokens(self) -> int:
        return len(self.packed) // 4

    def cut(self, start: int, end: int) -> Ids:
        return Ids(self.packed[4 * start : 4 * end])

    def common(self, other: Ids) -> int:
        low, high = 0, min(self.tokens, other.tokens)
        while low < high:
            middle = (low + high + 1) // 2
            if self.packed[4 * low : 4 * middle] == other.packed[4 * low : 4 * middle]:
                low = middle
            else:
                high = middle - 1
        return low

    def head(self, tokens: int) -> Hashable:
        return self.packed[: 4 * tokens]

    def grown(self, output: list[int] | int) -> Ids:
        if isinstance(output, int):
            raise TypeError("a prompt of ids grows by ids")
        return Ids(self.packed + pack(output))

    def seed(self) -> bytes:
        return self.packed


@dataclass(frozen=True, slots=True)
class Spans:
    """Named stretches (name, start, end): equal names at equal places are equal tokens."""

    runs: tuple[tuple[str, int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(end - start for _, start, end in self.runs)

    def cut(self, start: int, end: int) -> Spans:
        runs: list[tuple[str, int, int]] = []
        offset = 0
        for name, first, last in self.runs:
            low, high = max(start, offset), min(end, offset + last - first)
            if low < high:
                runs.append((name, first + low - offset, first + high - offset))
            offset += last - first
        return Spans(tuple(runs))

    def common(self, other: Spans) -> int:
        shared = 0
        for (name, start, end), (its_name, its_start, its_end) in zip(
            self.runs, other.runs, strict=False
        ):
            if (name, start) != (its_name, its_start):
                return shared
            shared += min(end, its_end) - start
            if end != its_end:
                return shared
        return shared

    def head(self, tokens: int) -> Hashable:
        return self.cut(0, tokens).runs

    def grown(self, output: list[int] | int) -> Spans:
        more = output if isinstance(output, int) else len(output)
        name, start, end = self.runs[-1]
        return Spans((*self.runs[:-1], (name, start, end + more)))

    def seed(self) -> bytes:
        return repr(self.runs).encode()


def ids_prompt(ids: Iterable[int]) -> Ids:
    """A prompt of token ids."""
    return Ids(pack(ids))


def named_prompt(*parts: tuple[str, int]) -> Spans:
    """A prompt known by names and lengths: a shared system prompt, then the job's own."""
    return Spans(tuple((name, 0, tokens) for name, tokens in parts if tokens))
