"""SGLang's own role switch: asked for until the server is idle, then verified, then told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from backends.base import Post
from backends.fetch import fetch
from backends.http import HttpError
from backends.pause import pause
from backends.sglang import BOOTSTRAP_PORT, Server, Sglang
from policies.clock import Clock
from policies.events import Event, Release, RoleSwitched, SwitchRole
from policies.types import Role

AGAIN_S = 0.1
"""Between two tries while the server says that it is not idle: aborts are on their way."""
NOT_IDLE = "not idle"
ANSWER_S = 2.0
ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE}


class SglangActuator:
    """Needs servers that were started with --enable-pd-role-switch.

    Another gateway may switch the same servers, and SGLang has no lock to take. So each is asked
    who it is just before, and nothing is asked of one that is not what it is known as, nor of one
    whose role nobody else has any more.
    """

    def __init__(
        self,
        backend: Sglang,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        *,
        idle_s: float = 10.0,
        switch_s: float = 110.0,
        graph_memory_gb: float = 0.0,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._tasks = tasks
        self._post: Post = _nobody
        self.idle_s = idle_s
        """For so long a server that is empty in the books may say that it is not idle."""
        self.switch_s = switch_s
        self.graph_memory_gb = graph_memory_gb
        """What must be free for the graphs of a decode server. A server that has not captured any
        yet refuses where it is not told, even where there are no graphs."""

    def connect(self, post: Post) -> None:
        self._post = post

    def move(self, decision: SwitchRole | Release) -> None:
        if isinstance(decision, Release):
            self._post(RoleSwitched(decision.worker, self._known(decision.worker), "not ours"))
            return
        self._tasks.create_task(self._switch(decision))

    def _server(self, name: str) -> Server | None:
        return next((it for it in self._backend.servers() if it.name == name), None)

    def _known(self, name: str) -> Role | None:
        server = self._server(name)
        return None if server is None else server.worker.role

    async def _switch(self, decision: SwitchRole) -> None:
        """Whatever happens, one event says what the server is now."""
        event = RoleSwitched(decision.worker, None, "it was taken off the list")
        try:
            if (server := self._server(decision.worker)) is not None:
                event = await self._switched(server, decision)
        except Exception as error:  # noqa: BLE001  # the task's edge: the move must end
            why = f"{type(error).__name__}: {error}"
            event = RoleSwitched(decision.worker, None, why)
        self._post(event)

    async def _switched(self, server: Server, decision: SwitchRole) -> RoleSwitched:
        was, known_as = await self._verified(server), server.worker.role
        if was is None:
            server.is_known = False
            return RoleSwitched(server.name, None, "it does not answer")
        if was is not known_as:
            self._note(server, was)
            why = f"it is a {was.value} server already, by somebody else's hand"
            return RoleSwitched(server.name, was, why, by_another=True)
        if not await self._has_others(server):
            return RoleSwitched(server.name, was, f"no other {was.value} server answers")
        why = await self._asked(server, decision.role)
        role = await self._verified(server)
        server.is_known = server.is_known and role is not None
        if role is not None:
            self._note(server, role)
        return RoleSwitched(server.name, role, why)

    async def _has_others(self, server: Server) -> bool:
        role = server.worker.role
        for other in list(self._backend.servers()):
            alike = other.worker.role is role and other.worker.model == server.worker.model
            if other.name != server.name and alike and await self._verified(other) is role:
                return True
        return False

    def _note(self, server: Server, role: Role) -> None:
        """Before anybody is sent there: in its new role it needs another name than before."""
        worker = server.worker
        if self._server(server.name) is not server or worker.role is role:
            return
        port = worker.bootstrap_port or (BOOTSTRAP_PORT if role is Role.PREFILL else None)
        self._backend.update(replace(worker, role=role, bootstrap_port=port))

    async def _asked(self, server: Server, role: Role) -> str:
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
