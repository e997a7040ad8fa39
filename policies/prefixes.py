"""How much of a prompt a server has seen before, as far as a router can tell without its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FIRST_PREFIX_TOKENS: Final = 64
"""A prompt has a key for its first 64 tokens, its first 128, and so on, each twice the last."""
MOST_PREFIXES: Final = 65_536
"""Remembered for each server, the latest; at 8 K tokens a prompt has eight."""


def prefix_tokens(keys: int) -> int:
    """What is alike in prompts that share so many keys, at least."""
    return FIRST_PREFIX_TOKENS << (keys - 1) if keys else 0


class Prefixes:
    """The keys of prompts that went to one server; the oldest are forgotten first."""

    __slots__ = ("_keys",)

    def __init__(self) -> None:
        self._keys: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, keys: Sequence[int]) -> None:
        known = self._keys
        for key in keys:
            known.pop(key, None)
            known[key] = None
        while len(known) > MOST_PREFIXES:
            del known[next(iter(known))]

    def matched(self, keys: Sequence[int]) -> int:
        """How many of a prompt's keys are known, from the shortest prefix on."""
        for number, key in enumerate(keys):
            if key not in self._keys:
                return number
        return len(keys)
