"""A running fleet: when a server is ready, what a failed start says, who is restarted when."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from backends.fleet import interpreter, memory, models, plug
from backends.fleet.link import Link
from backends.fleet.logs import Logs
from backends.fleet.plan import Server, planned, turned
from backends.fleet.spec import Device, FleetError, FleetSpec
from policies.types import Role

POLL_S = 0.2
ANSWER_TIMEOUT_S = 5.0
LOG_LINES = 12
PORT_TAKEN = "address already in use"
GAVE_UP = "kill_process_tree called"
"""SGLang kills itself with all its processes when one of them has failed, and says so before."""
RESTART_DELAY_S = 1.0
LONGEST_RESTART_DELAY_S = 60.0
STEADY_S = 60.0
"""A server that ran this long begins again with the shortest delay."""
STOCK_PROGRAM = ("-m", "sglang.launch_server")

Report = Callable[[str, str], None]
"""Hears how each server (or "fleet") is doing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaunched:
    why: str = ""
    """Why the server does not have the role that was asked for."""
    is_restarted: bool = False
    by_another: bool = False
    """Somebody else has it started just now."""


def silent(_name: str, _news: str) -> None:
    return


class Fleet:
    """`async with Fleet(spec) as fleet:` leaves no process behind, however the block ends."""

    def __init__(
        self,
        spec: FleetSpec,
        *,
        report: Report = silent,
        program: tuple[str, ...] = (),
        available_bytes: Callable[[], int] = memory.available_bytes,
    ) -> None:
        """`program` runs in place of SGLang, with each server's command line."""
        self.spec = spec
        self.servers: tuple[Server, ...] = ()
        self.logs = Path(spec.logs)
        self._report = report
        self._program = program or (STOCK_PROGRAM if spec.device is Device.CUDA else ())
        self._available_bytes = available_bytes
        self._python = interpreter.chosen(spec.python)
        self._ended: dict[str, asyncio.Future[int]] = {}
        self._more: dict[str, str] = {}
        """Environment of all of them."""
        self._turning: dict[str, asyncio.Future[None]] = {}
        """Servers that are started in another role: they are not restarted meanwhile."""

    async def __aenter__(self) -> Self:
        path = await self._checked_model()
        self.servers = planned(self.spec, path)
        self._kept = Logs(self.spec)
        self.logs = self._kept.folder
        if self.spec.plugin:
            self._more = plug.offered(self.logs / "plugin")
        loop = asyncio.get_running_loop()
        self._imported: asyncio.Future[None] = loop.create_future()
        arguments = (str(os.getpid()), str(self.logs / "spawner.log"), *self._program)
        spawner = interpreter.command(self._python, "backends.fleet.spawner", *arguments)
        self._link = Link(spawner, self._hear)
        await self._link.open()
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S))
        try:
            async with asyncio.timeout(self.spec.start_timeout_s):
                await self._start_all()
        except TimeoutError:
            await self._close()
            raise FleetError(not_ready(self.spec)) from None
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        if not self._imported.done():
            self._link.interrupt()
        try:
            await self._link.close()
        finally:
            self._kept.close()
            await self._http.close()

    async def _checked_model(self) -> str:
        """All that can be known before anything runs."""
        if not self._program and (missing := interpreter.missing_library()) is not None:
            raise FleetError(missing)
        path = await models.model_path(self.spec, self._python)
        if self.spec.device is Device.CPU and (shape := models.shape(path)) is not None:
            memory.check(self.spec, shape, self._available_bytes())
        return path

    async def _start_all(self) -> None:
        self._report("fleet", "starting" if self._program else "importing SGLang")
        await first_of(self._imported, self._link.lost)
        if not self._imported.done():
            raise self._lost()
        self._imported.result()
        try:
            async with asyncio.TaskGroup() as starting:
                for server in self.servers:
                    starting.create_task(self.start(server.name))
        except* FleetError as errors:
            raise FleetError(str(errors.exceptions[0])) from None

    def _hear(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "ready"}:
                self._imported.set_result(None)
            case {"event": "missing", "module": module}:
                told = interpreter.missing_package(module, self._python)
                self._imported.set_exception(FleetError(told))
            case {"event": "started", "name": name}:
                self._report(name, "starting")
            case {"event": "ended", "name": name, "code": code}:
                self._report(name, how_it_ended(code, last_lines(self.logs / f"{name}.log")))
                self._ended[name].set_result(code)
            case _:
                raise ValueError(f"unknown event {event}")

    def server(self, name: str) -> Server:
        return next(server for server in self.servers if server.name == name)

    async def start(self, name: str) -> None:
        """Until the server is ready; FleetError when it ends before that."""
        server = self.server(name)
        ended = self._ended[name] = asyncio.get_running_loop().create_future()
        log = self.logs / f"{name}.log"
        earlier = size_of(log)
        self._link.send(
            "start", name=name, argv=server.argv, env=self._more | server.env, log=str(log)
        )
        while not await self._is_ready(server):
            await first_of(ended, self._link.lost, timeout_s=POLL_S)
            if self._link.lost.done():
                raise self._lost()
            words = last_lines(log, earlier)
            if ended.done():
                raise FleetError(f"{name} {how_it_ended(ended.result(), words)}{words}")
            if PORT_TAKEN in words:  # the server itself would wait for ever
                await self.kill(name)
                raise FleetError(f"{name} found its port taken{words}")
        self._report(name, "ready")

    async def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends the signal to the server and its children, and waits for its end."""
        self._link.send("kill", name=name, number=number)
        await first_of(self._ended[name], self._link.lost)

    async def keep(self) -> None:
        """Restarts what ends by itself, later each time it ends at once; never returns."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for server in self.servers:
                    tasks.create_task(self._keep(server))
        except* FleetError as errors:
            raise FleetError(str(errors.exceptions[0])) from None

    async def _keep(self, server: Server) -> None:
        delay_s = RESTART_DELAY_S
        while True:
            if not await first_of(self._ended[server.name], self._link.lost, timeout_s=STEADY_S):
                delay_s = RESTART_DELAY_S
                await first_of(self._ended[server.name], self._link.lost)
            if (turning := self._turning.get(server.name)) is not None:
                await first_of(turning, self._link.lost)
                if self._link.lost.done():
                    raise self._lost()
                continue
            self._report(server.name, f"restarting in {delay_s:.0f} s")
            await first_of(self._link.lost, timeout_s=delay_s)
            if self._link.lost.done():
                raise self._lost()
            if server.name in self._turning:
                continue
            delay_s = min(2 * delay_s, LONGEST_RESTART_DELAY_S)
            with self._claimed(server.name):
                if why := await self._try(server.name):
                    self._report(server.name, _first_line(why))

    async def relaunch(self, url: str, role: Role) -> Relaunched:
        """Ends the server there and starts it in that role, or in its old one where that fails.

        The fleet decides for all who ask: one at a time for each server, and never the last one.
        """
        old = next((it for it in self.servers if it.url == url), None)
        if old is None:
            return Relaunched(why=f"the fleet has no server at {url}")
        if old.name in self._turning or self._ended[old.name].done():
            return Relaunched(why="it is being started already", by_another=True)
        if refusal := self._no_relaunch(old, role):
            return Relaunched(why=refusal)
        with self._claimed(old.name):
            self._report(old.name, f"starting again as a {role} server")
            await self.kill(old.name)
            self._replace(turned(self.spec, old, role))
            if why := await self._try(old.name):
                self._replace(old)
                self._report(old.name, f"going back to {old.role}: {_first_line(why)}")
                if again := await self._try(old.name):  # whoever keeps the fleet tries on
                    self._report(old.name, _first_line(again))
            return Relaunched(why=why, is_restarted=True)

    async def roles(self) -> dict[str, str]:
        """Of the servers, by their addresses."""
        return {it.url: it.role.value for it in self.servers}

    def _no_relaunch(self, server: Server, role: Role) -> str:
        if server.role is role:
            return f"it is a {role} server already"
        if Role.UNIFIED in (server.role, role):
            return "a unified server has neither role"
        others = (it.name for it in self.servers if it.role is server.role and it is not server)
        if all(name in self._turning or self._ended[name].done() for name in others):
            return f"it is the last {server.role} server"
        return ""

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        over = self._turning[name] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._turning[name]
            over.set_result(None)

    def _replace(self, new: Server) -> None:
        self.servers = tuple(new if it.name == new.name else it for it in self.servers)

    async def _try(self, name: str) -> str:
        """Starts it; why it did not start, and then it is ended."""
        try:
            async with asyncio.timeout(self.spec.start_timeout_s):
                await self.start(name)
        except FleetError as error:
            return str(error)
        except TimeoutError:
            await self.kill(name)
            return not_ready(self.spec)
        return ""

    def _lost(self) -> FleetError:
        log = self.logs / "spawner.log"
        return FleetError(f"the process that owns the servers ended{last_lines(log)}")

    async def _is_ready(self, server: Server) -> bool:
        try:
            async with self._http.get(f"{server.url}/ready") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def worker_tables(self) -> str:
        """What a gateway's configuration says of these servers."""
        return "\n\n".join(server.worker_table() for server in self.servers) + "\n"

    @property
    def pid(self) -> int:
        """Of the process from which all servers descend."""
        return self._link.pid

    def resident_bytes(self) -> int:
        return memory.pss_bytes(self.pid)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


async def first_of(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> bool:
    """Waits for any of them; whether one came in time."""
    done, _ = await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def how_it_ended(code: int, words: str = "") -> str:
    if code == -signal.SIGKILL and GAVE_UP in words:
        return "gave up"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; the system does that when memory runs out)"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def not_ready(spec: FleetSpec) -> str:
    return f"not ready after {spec.start_timeout_s:.0f} s"


def size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def last_lines(log: Path, earlier_bytes: int = 0) -> str:
    """The end of a log, indented below the message it explains; an earlier life's is left out."""
    try:
        lines = log.read_bytes()[earlier_bytes:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    shown = "".join(f"\n    {line}" for line in lines[-LOG_LINES:])
    return f"; the last lines of {log}:{shown}" if shown else ""
