"""Which servers a fleet consists of: their names, ports, command lines, and worker tables."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from backends.fleet.spec import Device, FleetError, FleetSpec, Group
from policies.types import Pool, Role

HOST = "127.0.0.1"
LOWEST_PORT, HIGHEST_PORT = 20_000, 32_000
"""Below those that the system gives to connections, so that a free one stays free."""
CPU_FLAGS = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--dtype", "float32"),
    *("--sampling-backend", "pytorch"),
    *("--grammar-backend", "none"),
    *("--max-running-requests", "32"),
    "--sleep-on-idle",  # without it an idle scheduler keeps half a core busy
)
PD_FLAGS = ("--disaggregation-transfer-backend", "mooncake", "--enable-pd-role-switch")
CPU_PD_FLAGS = ("--disaggregation-decode-retraction-backup", "cpu_tensor")
NO_OVERLAP = "--disable-overlap-schedule"
"""With it, a prefix hit on a prefill server waits for a CUDA event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server as it is started, and as a gateway addresses it."""

    name: str
    role: Role
    pool: Pool
    port: int
    bootstrap_port: int | None
    """Its own, so that it may become a prefill server later; a unified one needs none."""
    model_path: str
    argv: tuple[str, ...]
    env: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def worker_table(self) -> str:
        lines = [
            "[[worker]]",
            f'name = "{self.name}"',
            f'url = "{self.url}"',
            f'role = "{self.role}"',
            f'pool = "{self.pool}"',
        ]
        if self.bootstrap_port is not None:
            lines.append(f"bootstrap_port = {self.bootstrap_port}")
        return "\n".join(lines)


def planned(spec: FleetSpec, model_path: str) -> tuple[Server, ...]:
    ports = Ports()
    for group in spec.servers:
        ports.claim(range(group.port, group.port + group.count) if group.port else ())
    number = {role: count() for role in Role}
    return tuple(
        _server(
            spec, group, position, f"{group.role}-{next(number[group.role])}", model_path, ports
        )
        for group in spec.servers
        for position in range(group.count)
    )


def _server(
    spec: FleetSpec, group: Group, position: int, name: str, model_path: str, ports: Ports
) -> Server:
    port = group.port + position if group.port else ports.free()
    bootstrap_port = None if group.role is Role.UNIFIED else ports.free()
    env = dict(spec.env)
    if group.gpus:
        env["CUDA_VISIBLE_DEVICES"] = group.gpus[position]
    return Server(
        name=name,
        role=group.role,
        pool=group.pool,
        port=port,
        bootstrap_port=bootstrap_port,
        model_path=model_path,
        argv=_argv(spec, group.role, group.flags, port, bootstrap_port, model_path),
        env=env,
    )


def turned(spec: FleetSpec, server: Server, role: Role) -> Server:
    """The same server, to be started in another role: with the flags of those who have it."""
    flags = next((group.flags for group in spec.servers if group.role is role), ())
    argv = _argv(spec, role, flags, server.port, server.bootstrap_port, server.model_path)
    return replace(server, role=role, argv=argv)


def _argv(
    spec: FleetSpec,
    role: Role,
    flags: tuple[str, ...],
    port: int,
    bootstrap_port: int | None,
    model_path: str,
) -> tuple[str, ...]:
    return (
        *("--model-path", model_path),
        *("--served-model-name", spec.model.rstrip("/").rpartition("/")[2]),
        *("--host", HOST, "--port", str(port)),
        "--enable-metrics",
        *_device_flags(spec, role),
        *_role_flags(role, bootstrap_port),
        *spec.flags,
        *flags,
    )


def _device_flags(spec: FleetSpec, role: Role) -> Iterator[str]:
    if spec.device is Device.CPU:
        yield from CPU_FLAGS
        yield from ("--max-total-tokens", str(spec.kv_tokens))
        if role is not Role.UNIFIED:
            yield from CPU_PD_FLAGS
        if role is Role.PREFILL or (role is Role.DECODE and not spec.overlap):
            yield NO_OVERLAP


def _role_flags(role: Role, bootstrap_port: int | None) -> Iterator[str]:
    if role is not Role.UNIFIED:
        yield from ("--disaggregation-mode", str(role))
        yield from ("--disaggregation-bootstrap-port", str(bootstrap_port))
        yield from PD_FLAGS


class Ports:
    """Hands out ports that nobody listens on, each once."""

    def __init__(self) -> None:
        self._given: set[int] = set()
        self._next = LOWEST_PORT + os.getpid() * 37 % (HIGHEST_PORT - LOWEST_PORT)

    def claim(self, ports: Iterable[int]) -> None:
        for port in ports:
            if port in self._given:
                raise FleetError(f"port {port} is given to two servers")
            if not is_free(port):
                raise FleetError(f"port {port} is in use; choose another, or 0 for a free one")
            self._given.add(port)

    def free(self) -> int:
        while self._next in self._given or not is_free(self._next):
            self._next = LOWEST_PORT + (self._next - LOWEST_PORT + 1) % (HIGHEST_PORT - LOWEST_PORT)
        self._given.add(self._next)
        return self._next


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            return False
    return True
