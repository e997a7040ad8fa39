"""The engine's own time: SGLang stamps its batches by the same clock."""

from __future__ import annotations

from time import monotonic, sleep, thread_time


def now_us() -> float:
    return monotonic() * 1e6


def computed_us() -> float:
    """By this thread: what passes while others have the core is not in it."""
    return thread_time() * 1e6


def pause_us(for_us: float) -> None:
    """The engine's thread does nothing; others have the core."""
    sleep(for_us / 1e6)
