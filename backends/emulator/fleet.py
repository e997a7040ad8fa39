"""Many emulated servers in one process: each on its own port, all on one fabric."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from aiohttp import web

from backends.emulator.exchange import json_response
from backends.emulator.faults import Faults
from backends.emulator.server import Face
from backends.engine import MODES, Engine, EngineConfig, Fabric
from backends.steptimes import LinearStepTimes, StepTimes
from policies.clock import Clock
from policies.types import Pool, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """One server: its engine, its step times, and how its face behaves; port 0 is any free one."""

    engine: EngineConfig
    times: StepTimes = field(default_factory=LinearStepTimes)
    port: int = 0
    bootstrap_port: int = 0
    incremental: bool = False
    api_key: str | None = None
    pool: Pool = Pool.STRICT
    speed: float = 1.0
    host: str = "127.0.0.1"


class EmulatedServer:
    """A face that listens; it can be killed and started again on the same ports."""

    def __init__(self, spec: ServerSpec, clock: Clock, fabric: Fabric) -> None:
        self._socket = listening_socket(spec.port, spec.host)
        self._bootstrap_socket = listening_socket(spec.bootstrap_port, spec.host)
        self.port: int = self._socket.getsockname()[1]
        self.bootstrap_port: int = self._bootstrap_socket.getsockname()[1]
        self.spec = replace(spec, engine=replace(spec.engine, bootstrap_port=self.bootstrap_port))
        self.engine = Engine(self.spec.engine, clock, spec.times, fabric)
        self.face = Face(
            self.engine,
            incremental=spec.incremental,
            api_key=spec.api_key,
            base_slowness=1.0 / spec.speed,
        )
        self._runners: list[web.AppRunner] = []

    @property
    def name(self) -> str:
        return self.spec.engine.name

    @property
    def url(self) -> str:
        return f"http://{self.spec.host}:{self.port}"

    @property
    def faults(self) -> Faults:
        return self.face.faults

    async def start(self) -> None:
        await self._listen(self.face.application(), self._socket)
        await self._listen(self._bootstrap_application(), self._bootstrap_socket)

    async def stop(self) -> None:
        runners, self._runners = self._runners, []
        for runner in runners:
            await runner.cleanup()
        self._socket.close()
        self._bootstrap_socket.close()

    async def kill(self) -> None:
        """Everything inside is lost, open connections break, new ones are refused."""
        if self.engine.alive:
            self.engine.kill()
        await self.stop()

    async def restart(self) -> None:
        self._socket = listening_socket(self.port, self.spec.host)
        self._bootstrap_socket = listening_socket(self.bootstrap_port, self.spec.host)
        self.engine.revive()
        await self.start()

    async def _listen(self, app: web.Application, listener: socket.socket) -> None:
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.0
        )
        await runner.setup()
        self._runners.append(runner)
        await web.SockSite(runner, listener, backlog=1024).start()

    def _bootstrap_application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._bootstrap_health)
        app.router.add_get("/route", self._route)
        return app

    async def _bootstrap_health(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="OK")

    async def _route(self, request: web.Request) -> web.StreamResponse:
        if self.engine.role != Role.PREFILL:
            return web.Response(text="Prefill server not fully registered yet", status=503)
        return json_response(
            {
                "attn_tp_size": 1,
                "attn_cp_size": 1,
                "dp_size": 1,
                "pp_size": 1,
                "page_size": self.spec.engine.page_tokens,
                "follow_bootstrap_room": True,
                "prefill_http_port": self.port,
                "decode_allocation_policy": "early",
            }
        )


class EmulatedFleet:
    """`async with EmulatedFleet(specs) as fleet:` gives servers by name."""

    def __init__(self, specs: Sequence[ServerSpec], clock: Clock | None = None) -> None:
        self._specs = list(specs)
        self._clock = clock
        self.servers: dict[str, EmulatedServer] = {}

    async def __aenter__(self) -> Self:
        clock = self._clock if self._clock is not None else asyncio.get_running_loop()
        fabric = Fabric(clock)
        for spec in self._specs:
            server = EmulatedServer(spec, clock, fabric)
            self.servers[server.name] = server
            await server.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self.servers.values():
            await server.kill()

    @property
    def urls(self) -> dict[str, str]:
        return {name: server.url for name, server in self.servers.items()}

    @property
    def engines(self) -> dict[str, Engine]:
        return {name: server.engine for name, server in self.servers.items()}

    def __getitem__(self, name: str) -> EmulatedServer:
        return self.servers[name]

    async def kill(self, name: str) -> None:
        await self.servers[name].kill()

    async def restart(self, name: str) -> None:
        await self.servers[name].restart()

    def resident(self) -> dict[str, list[str]]:
        """What is left on any server: rid and stage; empty when nothing leaks."""
        left = {
            name: [f"{it.request.rid} {it.stage}" for it in server.engine.residents]
            for name, server in self.servers.items()
        }
        return {name: items for name, items in left.items() if items}

    def toml(self) -> str:
        """The [[worker]] tables of a gateway in front of this fleet."""
        return "\n".join(worker_table(server) for server in self.servers.values())


def worker_table(server: EmulatedServer) -> str:
    lines = [
        "[[worker]]",
        f'name = "{server.name}"',
        f'url = "{server.url}"',
        f'role = "{server.spec.engine.role}"',
        f'pool = "{server.spec.pool}"',
    ]
    if server.spec.engine.host:
        lines.append(f'host = "{server.spec.engine.host}"')
    if server.spec.engine.role != Role.UNIFIED:
        lines.append(f"bootstrap_port = {server.bootstrap_port}")
    return "\n".join(lines) + "\n"


def listening_socket(port: int, host: str = "127.0.0.1") -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


def describe(server: EmulatedServer) -> str:
    mode = MODES[server.spec.engine.role]
    role = "unified" if mode == "null" else mode
    return f"{server.name:<12} {role:<8} {server.url}  bootstrap {server.bootstrap_port}"
