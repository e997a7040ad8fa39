"""SGLang's own role switch: asked for until the server is idle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from backends.actuators.turning import AGAIN_S, Hindrance, Turned, object_of
from backends.base import Size
from backends.fetch import fetch
from backends.http import HttpError
from backends.pause import pause
from backends.sglang import Server
from policies.clock import Clock
from policies.types import Role, Worker

NOT_IDLE = "not idle"
"""Asked again: aborts are on their way."""


class SglangTurn:
    """Needs servers that were started with --enable-pd-role-switch.

    SGLang has no lock to take on a server's role: who else changes it is seen by what it is.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        idle_s: float = 10.0,
        switch_s: float = 110.0,
        graph_memory_gb: float = 0.0,
    ) -> None:
        self._clock = clock
        self.size: Size | None = None
        self.at_once: int | None = None
        self.idle_s = idle_s
        """For so long a server that is empty in the books may say that it is not idle."""
        self.switch_s = switch_s
        self.graph_memory_gb = graph_memory_gb
        """What must be free for the graphs of a decode server. A server that has not captured any
        yet refuses where it is not told, even where there are no graphs."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    async def problems(self, workers: Sequence[Worker]) -> list[str]:
        return []  # each server says itself whether it takes a switch

    async def hindrance(self) -> Hindrance | None:
        return None  # each server is asked itself, just before

    async def turn(self, server: Server, role: Role) -> Turned:
        """The server's reason where it refused, or why nothing came of it."""
        body: dict[str, Any] = {"new_role": role.value}
        if role is Role.DECODE:
            body["decode_cuda_graph_memory_gb"] = self.graph_memory_gb
        until_s = self._clock.time() + self.idle_s
        while True:
            try:
                answer = await fetch(
                    server.upstream,
                    b"POST",
                    b"/pd_role_switch",
                    orjson.dumps(body),
                    timeout_s=self.switch_s,
                )
            except HttpError as error:
                return Turned(why=str(error))
            told = object_of(answer.body)
            if answer.status == 200 and told.get("success") is True:
                return Turned()
            why = str(told.get("message") or f"it answered {answer.status}")
            if NOT_IDLE not in why or self._clock.time() >= until_s:
                return Turned(why=why)
            await pause(self._clock, AGAIN_S)

    async def end(self, server: Server) -> str:
        return "not ours"
