"""Servers that an actuator starts: each start is a task of its own, and ends nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from policies.types import Role


class Launches:
    """How many of each role are under way, as `Size` tells it."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        start: Callable[[Role], Awaitable[str]],
        failed: Callable[[Role, str], object],
    ) -> None:
        """`start` returns when the server is there, or why it is not, which `failed` is told."""
        self._tasks = tasks
        self._start = start
        self._failed = failed
        self._running: set[asyncio.Task[None]] = set()
        self.starting: dict[Role, int] = {}

    def launch(self, role: Role) -> bool:
        self._count(role, 1)
        task = self._tasks.create_task(self._launch(role))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    async def _launch(self, role: Role) -> None:
        try:
            why = await self._start(role)
        except Exception as error:  # noqa: BLE001  # the task's edge: a launch ends nothing else
            why = repr(error)
        finally:
            self._count(role, -1)
        if why:
            self._failed(role, why)

    def _count(self, role: Role, more: int) -> None:
        self.starting[role] = self.starting.get(role, 0) + more

    def cancel(self) -> None:
        for task in list(self._running):
            task.cancel()
