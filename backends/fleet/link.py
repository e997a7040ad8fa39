"""The line to the process that owns the servers: commands go down it, events come up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

from backends.fleet.interpreter import cannot_run

END_TIMEOUT_S = 15.0


class Link(asyncio.Protocol):
    """Closing it ends every server; so does the end of this process, however it comes."""

    def __init__(self, command: list[str], heard: Callable[[dict[str, Any]], None]) -> None:
        self._command = command
        self._heard = heard
        self._pending = b""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        try:
            self._process = owner(self._command)
        except OSError as error:
            raise cannot_run(self._command[0], error) from None
        assert self._process.stdout is not None
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.connect_read_pipe(lambda: self, self._process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def data_received(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._heard(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def send(self, do: str, **details: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # `lost` tells
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": do, **details}).encode() + b"\n")

    def interrupt(self) -> None:
        """For an owner that still imports, and so reads no commands and has no servers."""
        self._process.terminate()

    async def close(self, most_s: float = END_TIMEOUT_S) -> None:
        """It has so long to end what it owns."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await asyncio.wait([self.lost], timeout=most_s)
        self._transport.close()
        await asyncio.to_thread(end, self._process)  # it may hang, and requests run on this loop


def owner(command: list[str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C reaches only this process, which ends it in order."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """It has closed its output by now, or it hangs; its servers follow it either way."""
    try:
        process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
