"""Servers that were started and do not serve yet: none is started twice between the two."""

from __future__ import annotations

from collections.abc import Mapping

from policies.types import Role

ARRIVES_S = 10.0
"""A server whose start has ended is seen by then: its list is read, and it is asked who it is."""


class Coming:
    """Told how many starts are under way, and of every server that is new."""

    def __init__(self) -> None:
        self._starting: dict[Role, int] = {}
        self._early: dict[Role, int] = {}
        """Those that were seen before their start was said to have ended."""
        self._due_us: dict[Role, list[int]] = {}
        """Until when those are waited for whose start has ended."""

    def arrived(self, role: Role) -> None:
        if due := self._due_us.get(role):
            del due[0]
        elif self._early.get(role, 0) < self._starting.get(role, 0):
            self._early[role] = self._early.get(role, 0) + 1

    def look(self, starting: Mapping[Role, int], now_us: int) -> None:
        for role in (Role.PREFILL, Role.DECODE):
            now = starting.get(role, 0)
            ended = max(0, self._starting.get(role, 0) - now)
            early = min(ended, self._early.get(role, 0))
            due = [us for us in self._due_us.get(role, ()) if us > now_us]
            due += [now_us + round(ARRIVES_S * 1e6)] * (ended - early)
            self._starting[role], self._due_us[role] = now, due
            self._early[role] = min(self._early.get(role, 0) - early, now)

    def count(self, role: Role) -> int:
        """As of the last look."""
        early = self._early.get(role, 0)
        return self._starting.get(role, 0) - early + len(self._due_us.get(role, ()))
