"""A local fleet's servers are ended and started again in the other role."""

from __future__ import annotations

from typing import Protocol

from backends.actuators.turning import Turned
from backends.base import Size
from backends.fleet.fleet import Relaunched
from backends.sglang import Server
from policies.types import Role


class Relauncher(Protocol):
    """Whoever owns the processes: a fleet of this process, or one behind its socket.

    It decides for all who ask, so that two gateways can use it at once.
    """

    async def relaunch(self, url: str, role: Role) -> Relaunched: ...


class RelaunchTurn:
    """Needs no switch in SGLang, and gives the server's memory to its new role from the start."""

    def __init__(self, fleet: Relauncher) -> None:
        self._fleet = fleet
        self.size: Size | None = None

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def turn(self, server: Server, role: Role) -> Turned:
        done = await self._fleet.relaunch(server.worker.url, role)
        return Turned(why=done.why, is_restarted=done.is_restarted, by_another=done.by_another)

    async def end(self, server: Server) -> str:
        return "the fleet's servers are ended together"
