"""The socket of a fleet: whoever may open it can have a server started in another role."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backends.fleet.fleet import Fleet, Relaunched
from backends.fleet.spec import FleetError
from policies.types import Role

LINE_BYTES = 64 << 10
LIST_S = 10.0
RELAUNCH_S = 1_800.0
"""A relaunch is two starts at most, and as long as a start may take is for the fleet to say."""


@asynccontextmanager
async def controlled(fleet: Fleet, path: Path) -> AsyncIterator[None]:
    """One JSON object a line in, one out; only this user may open it.

    In: `{"do": "relaunch", "url": ..., "role": ...}` or `{"do": "list"}`. Out: what `Relaunched`
    has, `{"servers": {url: role}}`, or `{"error": ...}`.
    """
    _make_room(path)
    tasks: set[asyncio.Task[Any]] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            tasks.add(task)
        try:
            with suppress(ConnectionError, ValueError):  # gone, or a line that never ends
                while line := await reader.readline():
                    writer.write(json.dumps(await _answer(fleet, line)).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()
            if task is not None:
                tasks.discard(task)

    mask = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(talk, path, limit=LINE_BYTES)
    except OSError as error:
        raise FleetError(f"cannot listen on {path}: {error.strerror}") from None
    finally:
        os.umask(mask)
    try:
        yield
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        _remove(path)


def _make_room(path: Path) -> None:
    """A socket that nobody listens on any more is left by a fleet that was killed."""
    if not path.exists():
        return
    if not path.is_socket():
        raise FleetError(f"{path} is there already, and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            _remove(path)
        else:
            raise FleetError(f"another fleet listens on {path}")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _answer(fleet: Fleet, line: bytes) -> dict[str, Any]:
    try:
        match json.loads(line):
            case {"do": "relaunch", "url": str(url), "role": str(role)}:
                return asdict(await fleet.relaunch(url, Role(role)))
            case {"do": "list"}:
                return {"servers": await fleet.roles()}
            case _:
                return {"error": "unknown command"}
    except ValueError as error:
        return {"error": str(error)}


class FleetSocket:
    """The fleet of another process, as an actuator asks it; a connection for each question."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def relaunch(self, url: str, role: Role) -> Relaunched:
        """It may have been restarted although no answer has come: the server says what it is."""
        try:
            told = await self._ask({"do": "relaunch", "url": url, "role": role.value}, RELAUNCH_S)
            return Relaunched(
                why=str(told["why"]),
                is_restarted=told["is_restarted"] is True,
                by_another=told["by_another"] is True,
            )
        except FleetError as error:
            return Relaunched(why=str(error), is_restarted=True)
        except KeyError as error:
            return Relaunched(why=f"the fleet's answer has no {error}", is_restarted=True)

    async def roles(self) -> dict[str, str]:
        told = (await self._ask({"do": "list"}, LIST_S)).get("servers")
        return told if isinstance(told, dict) else {}

    async def _ask(self, question: dict[str, str], most_s: float) -> dict[str, Any]:
        try:
            reader, writer = await asyncio.open_unix_connection(self._path, limit=LINE_BYTES)
        except OSError as error:
            raise FleetError(f"no fleet listens on {self._path}: {error.strerror}") from None
        try:
            async with asyncio.timeout(most_s):
                writer.write(json.dumps(question).encode() + b"\n")
                line = await reader.readline()
        except ConnectionError:
            line = b""
        except TimeoutError:
            raise FleetError(f"the fleet has not answered in {most_s:.0f} s") from None
        finally:
            writer.close()
        if not line:
            raise FleetError("the fleet has ended before it answered")
        told = json.loads(line)
        if "error" in told:
            raise FleetError(f"the fleet refuses: {told['error']}")
        return dict(told)
