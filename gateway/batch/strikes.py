"""How often servers have failed a row, or died under it, until it has been tried often enough."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from gateway.batch.attempts import Later
from gateway.batch.objects import Row

ENGINE_ERRORS: Final = 8
"""So many times a living server may fail a row (each time after all attempts of a request)."""
DEATHS: Final = 16
"""So many tries of a row may end with a server that died or hung, or broke off, under it. It takes
more than half an hour of pauses to get there, and a row whose tokens are kept is counted anew
whenever it has got further: one that is innocent gets through in between, one that kills does not.
"""

_Key = tuple[int, int]


@dataclass(slots=True)
class _Toll:
    errors: int = 0
    deaths: int = 0
    kept_tokens: int = 0
    """That it went on from when a server died under it last."""


class Strikes:
    """Of this gateway alone; a restart forgets them, and another that claims a row counts anew."""

    def __init__(self) -> None:
        self._of: dict[_Key, _Toll] = {}

    def __len__(self) -> int:
        return len(self._of)

    def count(self, row: Row, outcome: Later) -> bool:
        """Whether that was the last try."""
        if not (outcome.is_engines or outcome.is_death):
            return False
        toll = self._of.setdefault(row.key, _Toll())
        if outcome.is_engines:
            toll.errors += 1
        else:
            has_got_on = row.checkpoint_tokens > toll.kept_tokens
            toll.deaths = 1 if has_got_on else toll.deaths + 1
            toll.kept_tokens = row.checkpoint_tokens
        return toll.errors >= ENGINE_ERRORS or toll.deaths >= DEATHS

    def forget(self, row: Row) -> None:
        self._of.pop(row.key, None)

    def keep_only(self, batches: Container[int]) -> None:
        """Other gateways end rows, too: what is left of them goes with their batch."""
        self._of = {key: toll for key, toll in self._of.items() if key[0] in batches}
