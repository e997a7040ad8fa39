"""How fast bytes of files pass through the event loop, which online requests need meanwhile."""

from __future__ import annotations

from typing import Final

from backends.pause import pause
from policies.clock import Clock

_BURST_S: Final = 0.01


class Throttle:
    """One for all uploads and downloads: each waits for those that came before it."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._free_s = clock.time()
        """Then what was let through has had its time."""

    async def let(self, size_bytes: int) -> None:
        """Returns once so many bytes may pass; who comes slowly does not wait."""
        now_s = self._clock.time()
        self._free_s = max(self._free_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s
        if self._free_s > now_s:
            await pause(self._clock, self._free_s - now_s)
