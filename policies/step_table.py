"""What a decode step takes, by what was predicted for it and what such steps have taken since."""

from __future__ import annotations

from policies.packing import StepUs

NEWS = 0.2
"""The weight of a new step in the mean of its cell, once the cell has seen five."""
FACTOR_NEWS = 0.02


class StepTable:
    """Cells of (requests, tokens): the tokens of the longest one, or of all together.

    A cell keeps how much longer its steps took than the profile says, so that a step at its edge
    is not taken for one at its centre. Cells never seen go by the mean of all that were.
    """

    __slots__ = ("_by_longest", "_cells", "_factor", "_profile", "_seen")

    def __init__(self, profile: StepUs, *, by_longest: bool) -> None:
        self._profile = profile
        self._by_longest = by_longest
        self._cells: dict[tuple[int, int], tuple[float, int]] = {}
        self._factor = 1.0
        self._seen = 0

    def __len__(self) -> int:
        return len(self._cells)

    def step_us(self, count: int, context_tokens: int, longest_tokens: int) -> float:
        tokens = longest_tokens if self._by_longest else context_tokens
        shift = tokens.bit_length() - 3
        key = (count, (shift << 3) | (tokens >> shift) if shift > 0 else tokens)  # as in `_cell`
        cell = self._cells.get(key)
        ratio = self._factor if cell is None else cell[0]
        return self._profile(count, context_tokens, longest_tokens) * ratio

    def observe(self, count: int, context_tokens: int, longest_tokens: int, took_us: float) -> None:
        profile_us = self._profile(count, context_tokens, longest_tokens)
        if profile_us <= 0 or took_us <= 0:
            return
        ratio, key = took_us / profile_us, self._cell(count, context_tokens, longest_tokens)
        mean, steps = self._cells.get(key, (ratio, 0))
        self._cells[key] = (mean + (ratio - mean) * max(NEWS, 1 / (steps + 1)), steps + 1)
        self._seen += 1
        self._factor += (ratio - self._factor) * max(FACTOR_NEWS, 1 / self._seen)

    def _cell(self, count: int, context_tokens: int, longest_tokens: int) -> tuple[int, int]:
        """Four cells to a doubling of tokens: the leading bits of the number."""
        tokens = longest_tokens if self._by_longest else context_tokens
        shift = max(0, tokens.bit_length() - 3)
        return count, (shift << 3) | (tokens >> shift)
