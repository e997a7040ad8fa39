"""The process that owns a fleet of Ray actors, beside the gateway and for it.

Ray ends a process that has lost its cluster, and wants all of its processes to have one version of
Python: so it is this one that joins the cluster. It reads one JSON command a line from its standard
input and writes one JSON event a line to its standard output; the end of its input is its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError

from backends.pause import pause
from backends.ray import host

PREFIX = "server-"
LEASE = "lease"
END_S = 10.0
STATE_S = 5.0
"""An actor that does not say how it is by then waits for its resources, or for its node."""
READY_POLL_S = 0.3
LONGEST_DELAY_S = 60.0
DIES = RayError, ValueError
"""An actor that is no more: its calls fail, and its name leads nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """The gateway's settings."""

    us: str
    address: str
    namespace: str
    command: list[str]
    prefill: int
    decode: int
    gpus: float
    cpus: float
    start_s: float
    poll_s: float
    outlive: bool
    asks_only: bool = False
    """Tells what the cluster has, and ends."""


@dataclass(slots=True)
class Kept:
    """One server as it should be."""

    role: str
    handle: Any
    asked: asyncio.Task[dict[str, Any] | Exception] | None = None
    state: dict[str, Any] | None = None
    busy: bool = False
    """Somebody is starting it just now."""
    delay_s: float = 1.0
    again_s: float = 0.0
    """When it may be started again."""


@dataclass(slots=True)
class Owner:
    told: Told
    events: int
    tasks: asyncio.TaskGroup
    servers: dict[str, Kept] = field(default_factory=dict)
    lease: Any = None
    holder: str = ""
    number: int = 0
    lacks: bool = False
    """The lease has just been taken: those that are to be there may not be."""

    def tell(self, event: str, **details: object) -> None:
        os.write(self.events, json.dumps({"event": event, **details}).encode() + b"\n")

    async def keep(self) -> None:
        """Tells how all are, and starts again what has ended."""
        clock = asyncio.get_running_loop()
        while True:
            try:
                await self._turn()
            except Exception:  # noqa: BLE001  # the task's edge: what is odd now may not be so next
                traceback.print_exc()
            await pause(clock, self.told.poll_s)

    async def _turn(self) -> None:
        await self._keep_lease()
        self._find()
        await self._look()
        if self.lacks:
            self._start_those_that_lack()
        self._report()

    async def _keep_lease(self) -> None:
        """It dies with its node. Had again at once, it is about the same servers as before."""
        is_lost = self.lease is not None and not await self._is_held()
        if is_lost:
            self.lease = None
        if self.lease is None:
            await self._take_lease()
        if is_lost:
            self.lacks = False

    async def _is_held(self) -> bool:
        try:
            async with asyncio.timeout(STATE_S):
                return bool(await self.lease.holder.remote() == self.told.us)
        except TimeoutError:  # as long as it is there, nobody else can have its name
            return True
        except DIES:
            return False

    def _report(self) -> None:
        states = [it.state for it in self.servers.values() if it.state and it.state["ready"]]
        self.tell("servers", servers=states, holder=self.holder, ours=self.lease is not None)

    async def _take_lease(self) -> None:
        options = {"name": LEASE, "num_cpus": 0, "max_concurrency": 1}
        try:
            actor: Any = ray.remote(host.Holder)
            lease = actor.options(**options).remote(self.told.us)
        except ValueError:  # the name is taken
            await self._ask_who_has_it()
            return
        self.lease, self.holder, self.lacks = lease, self.told.us, True

    async def _ask_who_has_it(self) -> None:
        try:
            async with asyncio.timeout(STATE_S):
                self.holder = await ray.get_actor(LEASE).holder.remote()
        except (*DIES, TimeoutError):
            self.holder = "nobody, for a moment"

    def _find(self) -> None:
        """Those of the namespace that are not known yet: of a holder before us, or beside us."""
        for name in ray.util.list_named_actors():
            number = name.removeprefix(PREFIX)
            if number == name or not number.isdecimal():
                continue
            self.number = max(self.number, int(number))
            if name not in self.servers:
                with suppress(ValueError):
                    self.servers[name] = Kept("", ray.get_actor(name))

    def _start_those_that_lack(self) -> None:
        """What outlived its gateway may have changed its role: only the whole number counts."""
        self.lacks = False
        have = [it.role for it in self.servers.values()]
        lacking = {
            "prefill": self.told.prefill - have.count("prefill"),
            "decode": self.told.decode - have.count("decode"),
        }
        for _ in range(self.told.prefill + self.told.decode - len(have)):
            role = max(lacking, key=lambda it: lacking[it])
            lacking[role] -= 1
            self._create(role)

    def _create(self, role: str) -> str:
        self.number += 1
        name, told = f"{PREFIX}{self.number}", self.told
        actor: Any = ray.remote(host.Host)
        handle = actor.options(
            name=name,
            num_gpus=told.gpus,
            num_cpus=told.cpus,
            lifetime="detached" if told.outlive else None,
            max_restarts=0,
        ).remote(name, told.command)
        handle.launch.remote(role)
        self.servers[name] = Kept(role, handle)
        return name

    async def _look(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name, kept in list(self.servers.items()):
                group.create_task(self._look_at(name, kept))

    async def _look_at(self, name: str, kept: Kept) -> None:
        try:
            kept.state = await self._state(kept)
        except TimeoutError:
            kept.state = None
            return
        except DIES:
            self._gone(name, kept)
            return
        kept.role = kept.role or str(kept.state["role"])
        if kept.state["ready"]:
            kept.delay_s = 1.0
        elif not kept.state["runs"] and self.lease is not None and not kept.busy:
            self._again(kept, lambda: kept.handle.launch.remote(kept.role))

    def _gone(self, name: str, kept: Kept) -> None:
        """Its node is lost, or somebody has ended it: where it is ours, another one is to come."""
        kept.state = None
        if self.lease is None or not kept.role:
            self.servers.pop(name, None)
        elif not kept.busy:
            self._again(kept, lambda: self._replace(name, kept))

    def _replace(self, name: str, kept: Kept) -> None:
        """Under another name: Ray goes on knowing that of the dead one."""
        del self.servers[name]
        new = self.servers[self._create(kept.role)]
        new.again_s, new.delay_s = kept.again_s, kept.delay_s

    @staticmethod
    def _again(kept: Kept, start: Callable[[], object]) -> None:
        """Later each time."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= kept.again_s:
            kept.again_s = now_s + kept.delay_s
            kept.delay_s = min(2 * kept.delay_s, LONGEST_DELAY_S)
            start()

    async def _state(self, kept: Kept) -> dict[str, Any]:
        """One question at a time: those to an actor that waits for its node would pile up."""
        if kept.asked is None:
            kept.asked = self.tasks.create_task(_awaited(kept.handle.state.remote()))
        asked = kept.asked
        done, _ = await asyncio.wait([asked], timeout=STATE_S)
        if not done:
            raise TimeoutError
        if kept.asked is asked:  # two may wait for the same answer
            kept.asked = None
        if isinstance(state := asked.result(), Exception):
            raise state
        return state

    # What the gateway asks for.

    async def obey(self, command: dict[str, Any]) -> None:
        number = command.pop("id", 0)
        actions: dict[str, Callable[..., Awaitable[tuple[str, bool]]]]
        actions = {"switch": self.switch, "start": self.start, "end": self.end}
        if self.lease is None:
            why = f"{self.holder} has the lease"
            self.tell("done", id=number, why=why, by_another=True, is_restarted=False)
            return
        try:
            why, is_restarted = await actions[command.pop("do")](**command)
        except Exception as error:  # noqa: BLE001  # the task's edge: whoever asked is told
            traceback.print_exc()
            why, is_restarted = f"{type(error).__name__}: {error}".partition("\n")[0], True
        self._report()
        self.tell("done", id=number, why=why, by_another=False, is_restarted=is_restarted)

    async def switch(self, name: str, role: str) -> tuple[str, bool]:
        """Into that role, or back into its old one."""
        kept = self.servers.get(name)
        if kept is None:
            return f"there is no actor {name}", False
        others = [it for it in self.servers.values() if it.role == kept.role and it is not kept]
        if not any(it.state and it.state["ready"] and not it.busy for it in others):
            return f"it is the last {kept.role} server", False
        old, kept.busy = kept.role, True
        try:
            if why := await self._launched(kept, role):
                again = await self._launched(kept, old)
                return (f"{why}; nor as what it was: {again}" if again else why), True
            return "", True
        finally:
            kept.busy = False

    async def _launched(self, kept: Kept, role: str) -> str:
        """Ready, or why not."""
        kept.role = role
        await kept.handle.launch.remote(role)
        return await self._until_ready(kept)

    async def _until_ready(self, kept: Kept) -> str:
        clock = asyncio.get_running_loop()
        until_s = clock.time() + self.told.start_s
        while clock.time() < until_s:
            try:
                kept.state = state = await self._state(kept)
            except TimeoutError:
                continue
            if state["ready"]:
                return ""
            if not state["runs"]:
                return str(state["words"])
            await pause(clock, READY_POLL_S)
        return f"not ready after {self.told.start_s:.0f} s"

    async def start(self, role: str) -> tuple[str, bool]:
        name = self._create(role)
        kept = self.servers[name]
        kept.busy = True
        try:
            why = await self._until_ready(kept)
            if why:
                self._end(name)
            return why, False
        except DIES:  # dead: nobody is to put another one in its place
            self.servers.pop(name, None)
            raise
        finally:
            kept.busy = False

    async def end(self, name: str) -> tuple[str, bool]:
        if name not in self.servers:
            return f"there is no actor {name}", False
        self._end(name)
        return "", False

    def _end(self, name: str) -> None:
        if (kept := self.servers.pop(name, None)) is not None:
            ray.kill(kept.handle)

    def close(self) -> None:
        """With the lease goes what it was for, unless the servers are to live on."""
        if self.lease is None:
            return
        if not self.told.outlive and self.servers:
            stopped = [it.handle.stop.remote() for it in self.servers.values()]
            ray.wait(stopped, num_returns=len(stopped), timeout=END_S)
            for name in list(self.servers):
                self._end(name)
        ray.kill(self.lease)


async def _awaited(reference: Any) -> dict[str, Any] | Exception:
    """A failure is an answer: it concerns whoever asked, not the group that the task belongs to."""
    try:
        state: dict[str, Any] = await reference
    except Exception as error:  # noqa: BLE001  # the task's edge
        return error
    return state


async def serve(told: Told, events: int) -> None:
    """Until the input ends."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as tasks:
        owner = Owner(told, events, tasks)
        owner.tell("joined")
        running = [tasks.create_task(owner.keep())]
        try:
            while line := await reader.readline():
                running.append(tasks.create_task(owner.obey(json.loads(line))))
        finally:
            for task in running:
                task.cancel()
            for kept in owner.servers.values():
                if kept.asked is not None:
                    kept.asked.cancel()
            owner.close()


def main(argv: list[str]) -> None:
    """argv: the settings, and the log for what Ray prints."""
    told = Told(**json.loads(argv[0]))
    events = os.dup(1)
    out = os.open(argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    cloudpickle.register_pickle_by_value(host)
    try:
        ray.init(
            address=told.address,
            namespace=told.namespace,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        problem = {"event": "lost", "why": str(error).partition("\n")[0]}
        os.write(events, json.dumps(problem).encode() + b"\n")
        return
    try:
        if told.asks_only:
            gpus = ray.cluster_resources().get("GPU", 0.0)
            os.write(events, json.dumps({"event": "cluster", "gpus": gpus}).encode() + b"\n")
        else:
            asyncio.run(serve(told, events))
    finally:
        ray.shutdown()
