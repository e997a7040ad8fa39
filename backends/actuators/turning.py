"""What every actuator does alike: who a server is before and after, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson

from backends.base import Post, Roll, Size
from backends.fetch import fetch
from backends.http import HttpError
from backends.pause import pause
from backends.sglang import BOOTSTRAP_PORT, Server, Sglang
from policies.clock import Clock
from policies.events import Event, Release, RoleSwitched, SwitchRole
from policies.types import Role, Worker

AGAIN_S = 0.1
"""Between two tries of a page that does not answer."""
ANSWER_S = 2.0
ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "null": Role.UNIFIED}
_PAGES = (b"/model_info", b"/server_info")
"""After a switch the first tells the role that the server has, the second its command line too."""


class UnfitError(Exception):
    """What the actuator needs is not there; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """What became of it, as far as whoever did it knows; the server itself is asked afterwards."""

    why: str = ""
    """Why nothing came of it."""
    by_another: bool = False
    """Nothing was done, because somebody else changes roles here."""
    is_restarted: bool = False
    """Its process is another one than before."""
    is_gone: bool = False
    """The server is no more."""
    successor: str = ""
    """Who is there in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hindrance:
    """Why no server can be changed just now."""

    why: str
    by_another: bool = False
    """Whoever does it answers; somebody else is the one to whom it listens."""


class Turn(Protocol):
    """How an empty server is made something else: all that differs between actuators."""

    size: Size | None
    """Starts servers, where it can; what it starts comes on the list."""
    at_once: int | None
    """So many changes at a time: no server is emptied that would wait for another one's."""

    async def open(self) -> None:
        """Before the first move; UnfitError where it cannot do any."""
        ...

    async def close(self) -> None: ...

    async def problems(self, workers: Sequence[Worker]) -> list[str]:
        """Asked in the place of `open`, and changes nothing: what would be in its way.

        UnfitError where `open` would have it.
        """
        ...

    async def hindrance(self) -> Hindrance | None:
        """Asked before a server is taken out of rotation; None: it would be changed, as far as
        anybody knows. It changes nothing, and is cheap."""
        ...

    async def turn(self, server: Server, role: Role) -> Turned:
        """Makes it a server of that role, or leaves it what it is, or brings it back to that."""
        ...

    async def end(self, server: Server) -> str:
        """Gives it back; why not, where it is still there."""
        ...


class Turning:
    """The last part of a switch, of a server that is empty and out of rotation.

    Others may change the same servers. So each is asked who it is just before, and nothing is
    done to one that is not what it is known as, nor to one whose role nobody else has any more.
    """

    def __init__(
        self,
        turn: Turn,
        backend: Sglang,
        clock: Clock,
        tasks: asyncio.TaskGroup,
        roll: Roll,
    ) -> None:
        self.turn = turn
        self._backend = backend
        self._clock = clock
        self._tasks = tasks
        self._roll = roll
        self._moves: set[asyncio.Task[None]] = set()
        self._post: Post = _nobody

    def connect(self, post: Post) -> None:
        self._post = post

    def move(self, decision: SwitchRole | Release) -> None:
        task = self._tasks.create_task(self._move(decision))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def close(self) -> None:
        """A move that is under way is left where it is: whoever looks next asks the servers."""
        for task in list(self._moves):
            task.cancel()
        await self.turn.close()

    async def _move(self, decision: SwitchRole | Release) -> None:
        """Whatever happens, one event says what the server is now."""
        event: RoleSwitched | None
        event = RoleSwitched(decision.worker, None, "it was taken off the list")
        try:
            if (server := self._server(decision.worker)) is not None:
                if isinstance(decision, SwitchRole):
                    event = await self._switched(server, decision.role)
                else:
                    event = await self._released(server)
        except Exception as error:  # noqa: BLE001  # the task's edge: the move must end
            why = f"{type(error).__name__}: {error}"
            if (server := self._server(decision.worker)) is not None:
                server.is_known = False  # its probe finds out
            event = RoleSwitched(decision.worker, None, why)
        if event is not None:
            self._post(event)

    def _server(self, name: str) -> Server | None:
        return next((it for it in self._backend.servers() if it.name == name), None)

    # Roles.

    async def _switched(self, server: Server, role: Role) -> RoleSwitched:
        was, known_as = await self.role_of(server), server.worker.role
        if was is None:
            server.is_known = False
            return RoleSwitched(server.name, None, "it does not answer")
        if was is not known_as:
            self._note(server, was)
            why = f"it is a {was.value} server already, by somebody else's hand"
            return RoleSwitched(server.name, was, why, by_another=True)
        if not await self._has_others(server):
            return RoleSwitched(server.name, was, f"no other {was.value} server answers")
        server.is_turning = True
        try:
            turned = await self.turn.turn(server, role)
            if turned.is_gone:
                return await self._succeeded(server, turned)
            return await self._stayed(server, turned, role)
        finally:
            server.is_turning = False

    async def _stayed(self, server: Server, turned: Turned, wanted: Role) -> RoleSwitched:
        role, why = await self.role_of(server), turned.why
        if role is not None and role is not wanted:
            why = why or f"it is said to be done, and it is a {role.value} server all the same"
        server.is_known = server.is_known and role is not None and not turned.is_restarted
        if role is not None:
            self._note(server, role, is_restarted=turned.is_restarted)
        return RoleSwitched(server.name, role, why, turned.by_another)

    async def _succeeded(self, server: Server, turned: Turned) -> RoleSwitched:
        """Off the list first, so that what is told of it concerns nobody else of its name."""
        role: Role | None = server.worker.role
        if (successor := self._server(turned.successor)) is not None:
            role = await self.role_of(successor)
        if turned.successor != server.name:  # else the one of that name is another one by now
            self._roll.leave(server.name)
        return RoleSwitched(server.name, role, turned.why, turned.by_another)

    async def _has_others(self, server: Server) -> bool:
        role = server.worker.role
        for other in list(self._backend.servers()):
            alike = other.worker.role is role and other.worker.model == server.worker.model
            if other.name != server.name and alike and await self.role_of(other) is role:
                return True
        return False

    def _note(self, server: Server, role: Role, *, is_restarted: bool = False) -> None:
        """Before anybody is sent there: what it is now needs another name than what it was."""
        worker = server.worker
        if self._server(server.name) is not server:
            return
        if worker.role is role and not is_restarted:
            return
        port = worker.bootstrap_port or (BOOTSTRAP_PORT if role is Role.PREFILL else None)
        self._backend.update(replace(worker, role=role, bootstrap_port=port))

    async def role_of(self, server: Server) -> Role | None:
        """What it says that it is; None where it does not answer."""
        for _ in range(3):
            try:
                for page in _PAGES:
                    answer = await fetch(server.upstream, b"GET", page, timeout_s=ANSWER_S)
                    told = object_of(answer.body).get("disaggregation_mode")
                    if answer.status == 200 and told in ROLES:
                        return ROLES[told]
            except HttpError:
                pass
            await pause(self._clock, AGAIN_S)
        return None

    # Size.

    async def _released(self, server: Server) -> RoleSwitched | None:
        """None where it is gone, which those hear who keep the list."""
        known_as = server.worker.role
        if not await self._has_others(server):
            return RoleSwitched(server.name, known_as, f"no other {known_as.value} server answers")
        if why := await self.turn.end(server):
            return RoleSwitched(server.name, await self.role_of(server), why)
        self._roll.leave(server.name)
        return None


def object_of(body: bytes) -> Mapping[str, Any]:
    """An answer that should be a JSON object; anything else tells nothing."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}


def _nobody(event: Event) -> None:
    raise RuntimeError(f"{event} before anyone listens")
