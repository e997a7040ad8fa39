"""A local fleet's servers are ended and started again in the other role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from backends.actuators.turning import Hindrance, Turned
from backends.base import Size
from backends.fleet.fleet import Relaunched
from backends.fleet.spec import FleetError
from backends.sglang import Server
from policies.types import Role, Worker


class Relauncher(Protocol):
    """Whoever owns the processes: a fleet of this process, or one behind its socket.

    It decides for all who ask, so that two gateways can use it at once.
    """

    async def relaunch(self, url: str, role: Role) -> Relaunched: ...

    async def roles(self) -> dict[str, str]:
        """Of its servers, by their addresses; FleetError where it does not answer."""
        ...


class RelaunchTurn:
    """Needs no switch in SGLang, and gives the server's memory to its new role from the start."""

    def __init__(self, fleet: Relauncher) -> None:
        self._fleet = fleet
        self.size: Size | None = None
        self.at_once: int | None = None

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def problems(self, workers: Sequence[Worker]) -> list[str]:
        try:
            owned = await self._fleet.roles()
        except FleetError as error:
            return [str(error)]
        theirs = [it for it in workers if it.role is not Role.UNIFIED and it.url not in owned]
        return [f"{it.name} is no server of the fleet: nobody can relaunch it" for it in theirs]

    async def hindrance(self) -> Hindrance | None:
        try:
            await self._fleet.roles()
        except FleetError as error:
            return Hindrance(why=str(error))
        return None

    async def turn(self, server: Server, role: Role) -> Turned:
        done = await self._fleet.relaunch(server.worker.url, role)
        return Turned(why=done.why, is_restarted=done.is_restarted, by_another=done.by_another)

    async def end(self, server: Server) -> str:
        return "the fleet's servers are ended together"
