"""How long a batch may take, as a client says it: 24h, 90m, 1h30m, 7d."""

from __future__ import annotations

import re
from typing import Final

_UNITS_S: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_PART: Final = re.compile(r"([0-9]{1,9})([dhms])")
_WHOLE: Final = re.compile(r"(?:[0-9]{1,9}[dhms]){1,4}")


def seconds_of(window: str) -> int | None:
    """None: it is no duration, or none at all."""
    if not _WHOLE.fullmatch(window):
        return None
    return sum(int(number) * _UNITS_S[unit] for number, unit in _PART.findall(window)) or None


def in_words(seconds: float) -> str:
    """As a client would say it: 30d, 1h30m."""
    left, said = round(seconds), ""
    for unit, size_s in _UNITS_S.items():
        count, left = divmod(left, size_s)
        said += f"{count}{unit}" if count else ""
    return said
