"""Servers on one GPU: each gets an equal share of its time while others are at work."""

from __future__ import annotations


class Gpu:
    """As the driver slices a GPU's time between processes: a pass that begins while others compute
    takes as many times as long as there are of them, itself included.

    It keeps what it began with, whoever comes or goes meanwhile.
    """

    def __init__(self) -> None:
        self._servers = 0
        self._computing: set[str] = set()

    def join(self) -> None:
        self._servers += 1

    @property
    def is_shared(self) -> bool:
        return self._servers > 1

    def begin(self, server: str) -> int:
        """How many times as long its pass takes."""
        self._computing.add(server)
        return len(self._computing)

    def end(self, server: str) -> None:
        self._computing.discard(server)
