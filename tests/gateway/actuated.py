"""Emulated servers that are ended and started again in another role, and what is told of that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from structlog.testing import capture_logs

from backends.emulator import EmulatedFleet
from backends.fleet.fleet import Relaunched
from gateway.actuation import Actuation
from gateway.config import RatioSettings
from policies.events import SwitchWanted
from policies.types import Role
from tests.gateway.gateway_under_test import Site, spec

FOUR = tuple(
    spec(f"{letter}{i}", role)
    for letter, role in (("p", Role.PREFILL), ("d", Role.DECODE))
    for i in (1, 2)
)


async def started_as(fleet: EmulatedFleet, name: str, role: Role, took_s: float) -> None:
    """Another process in the place of the one before."""
    await fleet.kill(name)
    await asyncio.sleep(took_s)
    server = fleet[name]
    await server.restart()
    server.engine.machine.take_role(role)


@dataclass
class ScriptedOwner:
    """Owns the processes, as a fleet does; what it is to do for each server is written down."""

    fleet: EmulatedFleet
    script: dict[str, str] = field(default_factory=dict)
    took_s: float = 8.0
    asked: list[tuple[str, Role]] = field(default_factory=list)

    def name_at(self, url: str) -> str:
        return next(name for name, it in self.fleet.servers.items() if it.url == url)

    async def roles(self) -> dict[str, str]:
        return {it.url: it.engine.role.value for it in self.fleet.servers.values()}

    async def relaunch(self, url: str, role: Role) -> Relaunched:
        name = self.name_at(url)
        self.asked.append((name, role))
        match self.script.get(name):
            case "refuses":
                return Relaunched(why="there is no room for it")
            case "busy":
                return Relaunched(why="it is being started already", by_another=True)
            case "hangs":
                await asyncio.sleep(10_000)
            case "dies":
                await self.fleet.kill(name)
                return Relaunched(why="weights do not fit", is_restarted=True)
            case "comes back":
                await started_as(self.fleet, name, self.fleet[name].engine.role, self.took_s)
                return Relaunched(why="weights do not fit", is_restarted=True)
            case "lies":
                return Relaunched(is_restarted=True)
            case "breaks":
                raise ZeroDivisionError
            case _:
                await started_as(self.fleet, name, role, self.took_s)
        return Relaunched(is_restarted=True)


def by(actuator: Actuation, **more: Any) -> RatioSettings:
    quick: dict[str, Any] = {"switch_s": 30.0, "drain_s": 20.0, "hand_over_s": 2.0}
    return RatioSettings(actuator=actuator, **quick | more)


@asynccontextmanager
async def overs(site: Site) -> AsyncIterator[list[dict[str, Any]]]:
    """The lines about role switches that were begun in this block, once they are over."""
    lines: list[dict[str, Any]] = []
    with capture_logs() as told:
        yield lines
        await site.until("no move", lambda: not site.core.switching.moves, within_s=900.0)
    lines += [dict(it) for it in told if it["event"] == "role switch"]
    site.complaints += [str(it) for it in told if it["log_level"] == "error"]


async def switched(site: Site, name: str, role: Role | None) -> list[tuple[str, str]]:
    """How it ended, and why."""
    async with overs(site) as lines:
        site.gateway.driver.post(SwitchWanted(name, role, "asked for"))
        await asyncio.sleep(0.5)
    return [(str(it["outcome"]), str(it["why"])) for it in lines]


def roles(site: Site) -> dict[str, str]:
    return {name: it.worker.role.value for name, it in site.core.ledgers.items()}


def usable(site: Site) -> set[str]:
    now_us = site.gateway.backend.now_us()
    return {name for name, it in site.core.ledgers.items() if it.usable(now_us)}


def names(specs: Sequence[Any]) -> set[str]:
    return {it.engine.name for it in specs}
