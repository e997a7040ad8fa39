"""An actuator that lacks what it needs, where nothing is going to be asked of it."""

from __future__ import annotations

from collections.abc import Sequence

from backends.actuators.turning import Hindrance, Turned
from backends.base import Size
from backends.sglang import Server
from policies.types import Role, Worker


class NobodyTurn:
    """Says what is missing to whoever asks all the same."""

    def __init__(self, why: str) -> None:
        self.why = why
        self.size: Size | None = None
        self.at_once: int | None = None

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def problems(self, workers: Sequence[Worker]) -> list[str]:
        return [self.why]

    async def hindrance(self) -> Hindrance | None:
        return Hindrance(why=self.why)

    async def turn(self, server: Server, role: Role) -> Turned:
        return Turned(why=self.why)

    async def end(self, server: Server) -> str:
        return self.why
