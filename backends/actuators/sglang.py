"""SGLang's own role switch: asked for until the server is idle, then verified, then told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson

from backends.base import Post
from backends.fetch import fetch
from backends.http import HttpError
from backends.pause import pause
from backends.sglang import Server, Sglang
from policies.clock import Clock
from policies.events import Event, Release, RoleSwitched, SwitchRole
from policies.types import Role

AGAIN_S = 0.1
"""Between two tries while the server says that it is not idle: aborts are on their way."""
NOT_IDLE = "not idle"
ANSWER_S = 2.0
ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE}


class SglangActuator:
    """Needs servers that were started with --enable-pd-role-switch."""

    def __init__(
        self,
        backend: Sglang,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        *,
        idle_s: float = 10.0,
        switch_s: float = 110.0,
        graph_memory_gb: float | None = None,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._tasks = tasks
        self._post: Post = _nobody
        self.idle_s = idle_s
        """For so long a server that is empty in the books may say that it is not idle."""
        self.switch_s = switch_s
        self.graph_memory_gb = graph_memory_gb
        """What a decode server keeps for its graphs; servers that have none yet ask for it."""

    def connect(self, post: Post) -> None:
        self._post = post

    def move(self, decision: SwitchRole | Release) -> None:
        if isinstance(decision, Release):
            self._post(RoleSwitched(decision.worker, self._known(decision.worker), "not ours"))
            return
        self._tasks.create_task(self._switch(decision))

    def _known(self, name: str) -> Role | None:
        servers = {server.name: server for server in self._backend.servers()}
        return servers[name].worker.role if name in servers else None

    async def _switch(self, decision: SwitchRole) -> None:
        """Whatever happens, one event says what the server is now."""
        role, why = None, "it was taken off the list"
        try:
            servers = {server.name: server for server in self._backend.servers()}
            if (server := servers.get(decision.worker)) is not None:
                why = await self._asked(server, decision.role)
                role = await self._verified(server)
                server.is_known = server.is_known and role is not None
        except Exception as error:  # noqa: BLE001  # the task's edge: the move must end
            why = f"{type(error).__name__}: {error}"
        self._post(RoleSwitched(decision.worker, role, why))

    async def _asked(self, server: Server, role: Role) -> str:
        """The server's reason where it refused, or why nothing came of it."""
        body: dict[str, Any] = {"new_role": role.value}
        if role is Role.DECODE and self.graph_memory_gb is not None:
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
                return str(error)
            told = _object(answer.body)
            if answer.status == 200 and told.get("success") is True:
                return ""
            why = str(told.get("message") or f"it answered {answer.status}")
            if NOT_IDLE not in why or self._clock.time() >= until_s:
                return why
            await pause(self._clock, AGAIN_S)

    async def _verified(self, server: Server) -> Role | None:
        """What it says that it is; None where it does not answer."""
        for _ in range(3):
            try:
                answer = await fetch(server.upstream, b"GET", b"/model_info", timeout_s=ANSWER_S)
            except HttpError:
                await pause(self._clock, AGAIN_S)
                continue
            if answer.status == 200:
                return ROLES.get(str(_object(answer.body).get("disaggregation_mode")))
            await pause(self._clock, AGAIN_S)
        return None


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def _nobody(event: Event) -> None:
    raise RuntimeError(f"{event} before anyone listens")
