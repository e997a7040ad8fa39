"""Servers of a Ray cluster: an actor ends its process and starts it in the other role in place."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import structlog

from backends.actuators.launches import Launches
from backends.actuators.settings import Ray
from backends.actuators.turning import Hindrance, Turned, UnfitError
from backends.base import Roll, Size
from backends.fleet import interpreter
from backends.fleet.link import Link
from backends.fleet.spec import FleetError
from backends.pause import pause
from backends.sglang import Server
from policies.clock import Clock
from policies.types import Role, Worker

log = structlog.get_logger("slackwater.ray")

AGAIN_S = 10.0
"""A process that has lost the cluster is followed by another one after this time."""
LOST = "the Ray cluster is lost"
SLACK_S = 60.0
"""Beside the two starts that a switch may take."""


class RayTurn:
    def __init__(
        self,
        actors: Ray,
        clock: Clock,
        rng: random.Random,
        tasks: asyncio.TaskGroup,
        roll: Roll,
    ) -> None:
        self._actors = actors
        self._clock = clock
        self._us = f"{socket.gethostname()}-{rng.getrandbits(32):08x}"
        self._tasks = tasks
        self._roll = roll
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listed: set[str] = set()
        self._busy: set[str] = set()
        self._holder: str | None = None
        """Who has the lease, as the process said last; empty: this gateway."""
        self._link: Link | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._launches = Launches(tasks, self._start, _not_started)
        self.size: Size | None = self._launches
        self.at_once: int | None = None

    async def open(self) -> None:
        """Joined; servers that start come later."""
        try:
            await self._join()
        except FleetError as error:
            raise UnfitError(str(error)) from None
        self._keeper = self._tasks.create_task(self._keep())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        self._launches.cancel()
        if self._link is not None:
            await self._link.close()

    async def _join(self) -> None:
        """FleetError where the cluster cannot be joined."""
        self._joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        link = self._owner(self._hear)
        await link.open()
        self._link = link  # the old one is lost, which says to whoever looks that it is to be tried
        waited = (self._joined, self._link.lost)
        await asyncio.wait(waited, timeout=self._actors.join_s, return_when=asyncio.FIRST_COMPLETED)
        if self._joined.done():
            if self._joined.exception() is not None:
                await self._link.close(0.0)
            self._joined.result()
            return
        ended = self._link.lost.done()
        await self._link.close(0.0)
        raise FleetError(
            f"no Ray cluster at {self._actors.address}: {self._silent(has_ended=ended)}"
        )

    def _owner(self, hear: Callable[[dict[str, Any]], None], *, asks_only: bool = False) -> Link:
        actors = self._actors
        told = {
            "us": self._us,
            "address": actors.address,
            "namespace": actors.namespace,
            "command": shlex.split(actors.command),
            "prefill": actors.prefill,
            "decode": actors.decode,
            "gpus": actors.gpus,
            "cpus": actors.cpus,
            "start_s": actors.start_s,
            "poll_s": actors.poll_s,
            "outlive": actors.outlive,
            "asks_only": asks_only,
        }
        arguments = (json.dumps(told), actors.log or "/dev/null")
        python = interpreter.chosen(actors.python)
        return Link(interpreter.command(python, "backends.ray.start", *arguments), hear)

    async def problems(self, workers: Sequence[Worker]) -> list[str]:
        actors, heard = self._actors, list[dict[str, Any]]()
        link = self._owner(heard.append, asks_only=True)
        try:
            await link.open()
        except FleetError as error:
            raise UnfitError(str(error)) from None
        await asyncio.wait([link.lost], timeout=actors.join_s)
        ended = link.lost.done()
        await link.close(0.0)
        needed = (actors.prefill + actors.decode) * actors.gpus
        match heard:
            case [{"event": "cluster", "gpus": float(gpus)}]:
                short = f"the Ray cluster has {gpus:g} GPUs, {needed:g} are needed"
                return [short] if gpus < needed else []
            case [{"why": str(why)}]:
                raise UnfitError(f"no Ray cluster at {actors.address}: {why}")
            case _:
                raise UnfitError(
                    f"no Ray cluster at {actors.address}: {self._silent(has_ended=ended)}"
                )

    def _silent(self, *, has_ended: bool) -> str:
        python = interpreter.chosen(self._actors.python)
        if has_ended:
            return f"{python} has no Ray, or it ended: pip install 'slackwater[ray]' there"
        return f"none in {self._actors.join_s:.0f} s"

    async def hindrance(self) -> Hindrance | None:
        if self._is_lost:
            return Hindrance(why=LOST)
        if self._holder is None:
            return Hindrance(why="the Ray cluster has not told yet who has the lease")
        if self._holder:
            return Hindrance(why=f"{self._holder} has the lease", by_another=True)
        return None

    @property
    def _is_lost(self) -> bool:
        return self._link is None or self._link.lost.done()

    async def _keep(self) -> None:
        """A cluster that is lost is joined again; its servers' own probes say how they are."""
        while True:
            assert self._link is not None
            await asyncio.wait([self._link.lost])
            log.warning("the Ray cluster is lost", again_s=AGAIN_S)
            self._holder = None
            for asked in self._asked.values():
                if not asked.done():
                    asked.set_result({"why": LOST, "is_restarted": True})
            await self._link.close()
            await pause(self._clock, AGAIN_S)
            with suppress(FleetError):
                await self._join()

    def _hear(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "joined"}:
                self._joined.set_result(None)
            case {"event": "lost", "why": str(why)}:
                error = FleetError(f"no Ray cluster at {self._actors.address}: {why}")
                self._joined.set_exception(error)
            case {"event": "servers", "servers": list(servers), "ours": bool(ours)}:
                self._holder = "" if ours else str(event.get("holder"))
                self._list(servers)
            case {"event": "done", "id": int(number), **told}:
                if (asked := self._asked.get(number)) is not None and not asked.done():
                    asked.set_result(told)
            case _:
                log.warning("an unknown event from Ray", told=str(event)[:200])

    def _list(self, servers: list[dict[str, Any]]) -> None:
        """Who is not ready for a moment stays on the list while it is being switched."""
        ready = {str(it["name"]): it for it in servers}
        for name, told in ready.items():
            if name not in self._listed:
                self._listed.add(name)
                self._roll.come(self._worker(told))
        for name in sorted(self._listed - ready.keys() - self._busy):
            self._listed.discard(name)
            self._roll.leave(name)

    def _worker(self, told: dict[str, Any]) -> Worker:
        url = str(told["url"])
        return Worker(
            name=str(told["name"]),
            url=url,
            role=Role(told["role"]),
            pool=self._actors.pool,
            bootstrap_host=url.partition("://")[2].rpartition(":")[0],
            bootstrap_port=int(told["bootstrap_port"]),
        )

    async def _ask(self, do: str, **details: object) -> dict[str, Any]:
        """What became of it."""
        if self._link is None or self._is_lost:
            return {"why": LOST}
        number = next(self._numbers)
        asked = self._asked[number] = asyncio.get_running_loop().create_future()
        most_s = 2 * self._actors.start_s + SLACK_S
        late = self._clock.call_at(
            self._clock.time() + most_s, _late, asked, f"no word after {most_s:.0f} s"
        )
        try:
            self._link.send(do, id=number, **details)
            told: dict[str, Any] = await asked
            return told
        finally:
            late.cancel()
            del self._asked[number]

    # Roles and size.

    async def turn(self, server: Server, role: Role) -> Turned:
        self._busy.add(server.name)
        try:
            told = await self._ask("switch", name=server.name, role=role.value)
        finally:
            self._busy.discard(server.name)
        return Turned(
            why=str(told.get("why", "")),
            by_another=told.get("by_another") is True,
            is_restarted=told.get("is_restarted") is True,
        )

    async def end(self, server: Server) -> str:
        return str((await self._ask("end", name=server.name)).get("why", ""))

    async def _start(self, role: Role) -> str:
        """Ray finds the GPUs, or it does not come."""
        return str((await self._ask("start", role=role.value)).get("why", ""))


def _not_started(role: Role, why: str) -> None:
    log.warning("no actor was started", role=role.value, error=why)


def _late(asked: asyncio.Future[dict[str, Any]], why: str) -> None:
    if not asked.done():
        asked.set_result({"why": why, "is_restarted": True})
