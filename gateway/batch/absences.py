"""When to ask again for a batch whose model no server has: all of its rows wait together."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from gateway.errors import Code

ABSENT: Final = frozenset({Code.UNKNOWN_MODEL, Code.NEEDS_UNIFIED_SERVER})
"""What is said of all rows of a batch while its servers are off the list: they may come back."""
TRIALS: Final = 8
"""Some ten minutes with the pauses in between; then it is the rows' answer."""
_SECOND_US: Final = 1_000_000
_FIRST_PAUSE_US: Final = 5 * _SECOND_US
_LONGEST_PAUSE_US: Final = 300 * _SECOND_US


@dataclass(slots=True)
class _Absence:
    trials: int = 0
    until_us: int = 0


class Absences:
    """Of this gateway alone; a batch has one model and one endpoint, so that its rows are alike."""

    def __init__(self) -> None:
        self._of: dict[int, _Absence] = {}

    def __contains__(self, batch: int) -> bool:
        return batch in self._of

    def met(self, batch: int, now_us: int) -> bool:
        """Whether its rows have waited long enough. All rows of one bad moment count once."""
        found = self._of.setdefault(batch, _Absence())
        if now_us >= found.until_us and found.trials < TRIALS:
            pause_us = min(_FIRST_PAUSE_US << found.trials, _LONGEST_PAUSE_US)
            found.trials += 1
            found.until_us = now_us + pause_us
        return found.trials >= TRIALS

    def pause_us(self, batch: int, now_us: int) -> int:
        """How long its rows wait, in whole seconds: those that wait alike go back together."""
        found = self._of.get(batch)
        if found is None or found.trials >= TRIALS or now_us >= found.until_us:
            return 0
        return -((now_us - found.until_us) // _SECOND_US) * _SECOND_US

    def over(self, batch: int) -> None:
        """A server has answered one of its rows."""
        self._of.pop(batch, None)

    def keep_only(self, batches: Container[int]) -> None:
        self._of = {batch: one for batch, one in self._of.items() if batch in batches}
