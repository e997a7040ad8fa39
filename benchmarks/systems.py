"""Which proxies are measured and how each is started: defaults, apart from the addresses."""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.load import Load, apply
from benchmarks.processes import (
    DidNotStart,
    Running,
    free_port,
    start,
    wait_until_listening,
)

ROOT = Path(__file__).resolve().parent.parent
BOOTSTRAP_PORT = 8998
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """Bare workers on this machine, by their ports."""

    prefills: tuple[int, ...]
    decodes: tuple[int, ...]


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def start_worker(running: list[Running], role: str, step_ms: float) -> tuple[Running, int]:
    port = free_port()
    options = ["--role", role, "--port", str(port), "--step-ms", str(step_ms)]
    command = [sys.executable, "-m", "benchmarks.worker", *options]
    running.append(start(f"{role} worker", command, cwd=ROOT))
    return running[-1], port


def start_fleet(running: list[Running], *, step_ms: float, decodes: int = 1) -> Fleet:
    roles = ["prefill", *["decode"] * decodes]
    workers = [start_worker(running, role, step_ms) for role in roles]
    for worker, port in workers:
        wait_until_listening(worker, port)
    ports = [port for _, port in workers]
    return Fleet((ports[0],), tuple(ports[1:]))


def pair_options(fleet: Fleet) -> list[str]:
    prefills = [["--prefill", url(port), str(BOOTSTRAP_PORT)] for port in fleet.prefills]
    decodes = [["--decode", url(port)] for port in fleet.decodes]
    return [word for option in (*prefills, *decodes) for word in option]


def slackwater(port: int, fleet: Fleet) -> list[str]:
    serve = [sys.executable, "-m", "gateway", "serve", "--host", "127.0.0.1", "--port", str(port)]
    return [*serve, *pair_options(fleet)]


def rust_options(port: int, fleet: Fleet) -> list[str]:
    """Quiet logs and a short look for workers at the start; nothing that changes a request."""
    return [
        "--pd-disaggregation",
        *pair_options(fleet),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        *("--log-level", "warn", "--worker-startup-check-interval", "1"),
    ]


def sglang_router(port: int, fleet: Fleet) -> list[str]:
    return [sys.executable, "-m", "sglang_router.launch_router", *rust_options(port, fleet)]


def smg(port: int, fleet: Fleet) -> list[str]:
    return [str(Path(sys.executable).with_name("smg")), "launch", *rust_options(port, fleet)]


@dataclass(frozen=True, slots=True)
class System:
    """Something that stands between a client and the workers; `bare` has no command."""

    name: str
    command: Callable[[int, Fleet], list[str]] | None = None
    module: str = ""
    """What must be installed for it."""


SYSTEMS = {
    "slackwater": System("slackwater", slackwater, "gateway.__main__"),
    "sglang-router": System("sglang-router", sglang_router, "sglang_router"),
    "smg": System("smg", smg, "smg"),
    "bare": System("bare"),
}


def templated(text: str) -> System:
    """`NAME=COMMAND` with {port}, {prefill_port} and {decode_port}: any other proxy beside ours."""
    name, separator, template = text.partition("=")
    if not (name and separator and "{port}" in template):
        raise ValueError(f"{text!r} is not NAME=COMMAND with {{port}} in it")

    def command(port: int, fleet: Fleet) -> list[str]:
        ports = {"port": port, "prefill_port": fleet.prefills[0], "decode_port": fleet.decodes[0]}
        return [word.format(**ports) for word in shlex.split(template)]

    return System(name, command)


class NotInstalled(RuntimeError):
    """A system was asked for that this environment does not have."""


def require(system: System) -> None:
    found = None
    with contextlib.suppress(ModuleNotFoundError):
        found = importlib.util.find_spec(system.module) if system.module else system
    if found is None:
        raise NotInstalled(
            f"{system.name} is not here (no module {system.module}): install the extra `bench`, "
            f"or leave it out with --systems"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A started system: where it listens, and which process pays for it."""

    system: System
    url: str
    program: Running | None

    @property
    def name(self) -> str:
        return self.system.name


def start_system(running: list[Running], system: System, fleet: Fleet) -> Target:
    """The bare target is the decode worker itself: what no proxy at all would be."""
    if system.command is None:
        return Target(system, url(fleet.decodes[0]), None)
    port = free_port()
    program = start(system.name, system.command(port, fleet), cwd=ROOT)
    running.append(program)
    return Target(system, url(port), program)


def start_systems(running: list[Running], systems: list[System], fleet: Fleet) -> list[Target]:
    """All at once, because the slowest takes seconds; back when each has answered a request."""
    targets = [start_system(running, system, fleet) for system in systems]
    for target in targets:
        wait_until_serving(target)
    return targets


def wait_until_serving(target: Target) -> None:
    """Ready is what answers a request rightly; every router has its own idea of a health check."""
    probe = Load(url=target.url, clients=1, requests=1, tokens=1, stream=False, patience_s=5)
    deadline = time.monotonic() + START_S
    errors: dict[str, int] = {}
    while time.monotonic() < deadline and not (target.program and target.program.ended):
        outcome = uvloop.run(apply(probe))
        if outcome.answered:
            return
        errors = {str(flaw): count for flaw, count in outcome.errors.items()}
        time.sleep(0.2)
    words = target.program.last_words() if target.program else ""
    raise DidNotStart(f"{target.name} does not serve: {errors} {words}")
