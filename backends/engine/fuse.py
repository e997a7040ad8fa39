"""Requests that wait for something with the same patience: one timer for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from backends.engine.request import Resident
from policies.clock import Clock, Timer


class Fuse:
    """Calls `blow` for each request that `still` waits after `after_s`."""

    def __init__(
        self,
        clock: Clock,
        after_s: float,
        *,
        still: Callable[[Resident], bool],
        blow: Callable[[Resident], None],
    ) -> None:
        self._clock = clock
        self._after_s = after_s
        self._still = still
        self._blow = blow
        self._lit: deque[tuple[float, Resident]] = deque()
        self._timer: Timer | None = None

    def light(self, resident: Resident) -> None:
        self._lit.append((self._clock.time() + self._after_s, resident))
        self._arm()

    def clear(self) -> None:
        self._lit.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _arm(self) -> None:
        while self._lit and not self._still(self._lit[0][1]):
            self._lit.popleft()
        if self._lit and self._timer is None:
            self._timer = self._clock.call_at(self._lit[0][0], self._burn)

    def _burn(self) -> None:
        self._timer = None
        now = self._clock.time()
        while self._lit and self._lit[0][0] <= now:
            _, resident = self._lit.popleft()
            if self._still(resident):
                self._blow(resident)
        self._arm()
