"""When the garbage collector runs: rarely, and never over what the start has made."""

from __future__ import annotations

import gc


def run_rarely() -> None:
    """A request leaves no cycles worth looking for so often: by default the collector would run
    every few requests, over all that the start has made."""
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
