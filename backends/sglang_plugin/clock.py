"""The engine's own time: SGLang stamps its batches by the same clock."""

from __future__ import annotations

from time import monotonic


def now_us() -> float:
    return monotonic() * 1e6
