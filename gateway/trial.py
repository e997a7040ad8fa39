"""One token through a pair or a unified server: the only proof that it works."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson

from backends.fetch import fetch
from backends.http import HttpError
from backends.pause import pause
from backends.sglang import Server
from backends.trouble import Blame, judge_answer
from policies.clock import Clock

ABORT_AFTER_S = 0.1
"""An abort that overtakes its own request is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a job could go; without a prefill server, all of it goes to `decode`."""

    prefill: Server | None
    decode: Server


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    prefill: str
    decode: str
    error: str
    """Empty: a token came."""
    took_ms: float


class _NoToken(Exception):
    """One leg has failed, and so has the trial."""


async def try_out(route: Route, rid: str, room: int, timeout_s: float, clock: Clock) -> Trial:
    began_s = clock.time()
    error = await _error_of(route, rid, room, timeout_s)
    took_ms = (clock.time() - began_s) * 1000
    if error:
        await _abort(route, rid, clock)
    prefill = "" if route.prefill is None else route.prefill.name
    return Trial(prefill=prefill, decode=route.decode.name, error=error, took_ms=took_ms)


async def _error_of(route: Route, rid: str, room: int, timeout_s: float) -> str:
    body = orjson.dumps(_body(route, rid, room))
    error = ""
    try:
        async with asyncio.TaskGroup() as legs:
            if route.prefill is not None:
                legs.create_task(_leg(route.prefill, body, Blame.PREFILL, timeout_s))
            legs.create_task(_leg(route.decode, body, Blame.DECODE, timeout_s))
    except* _NoToken as failed:
        error = str(failed.exceptions[0])
    return error


def _body(route: Route, rid: str, room: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "text": "Hello",
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "rid": rid,
    }
    if route.prefill is not None:
        body["bootstrap_host"] = route.prefill.worker.bootstrap_host
        body["bootstrap_port"] = route.prefill.worker.bootstrap_port
        body["bootstrap_room"] = room
    return body


async def _leg(server: Server, body: bytes, leg: Blame, timeout_s: float) -> None:
    try:
        answer = await fetch(server.upstream, b"POST", b"/generate", body, timeout_s=timeout_s)
    except HttpError as error:
        raise _NoToken(f"{server.name}: {error}") from None
    trouble = judge_answer("generate", answer.status, answer.body, leg=leg)
    if trouble is not None:
        raise _NoToken(f"{server.name}: {trouble.status} {trouble.message}")


async def _abort(route: Route, rid: str, clock: Clock) -> None:
    """Nothing of a failed trial stays on a server."""
    await pause(clock, ABORT_AFTER_S)
    body = orjson.dumps({"rid": rid})
    for server in (route.prefill, route.decode):
        if server is not None:
            try:
                await fetch(server.upstream, b"POST", b"/abort_request", body, timeout_s=1.0)
            except HttpError:
                continue
