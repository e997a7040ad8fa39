"""An operator's own service is asked to change a server, with one question until it has answered.

The question is a POST of one JSON object, the same each time it is put:

    {"schema": "slackwater.change/1", "id": "5f0c...", "action": "switch", "role": "prefill",
     "worker": {"name": "decode-2", "url": "http://10.0.0.3:30000", "model": "m", "role": "decode"},
     "within_s": 600}

`action` is "switch", "end" (without a role), "cancel" (of the question with that id) or "check".
`id` is the idempotency key, in the header of that name, too: a question that comes again with the
same id is the same question. With a secret, `x-slackwater-signature` holds `sha256=` and the
HMAC-SHA256 of the body in hexadecimal digits.

The answer is 200 or 202 and an object: `{"status": "pending"}` (it is asked again), `{"status":
"done"}` (with `{"url", "bootstrap_port", "name"}` as "worker" where another server is there now),
`{"status": "refused", "why": "..."}`; or 409 with a "why" where somebody else changes servers.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import orjson
import structlog

from backends.actuators.settings import Webhook
from backends.actuators.turning import Hindrance, Turned, UnfitError, object_of
from backends.base import Roll, Size
from backends.fetch import fetch
from backends.http import HttpError, Reason, Upstream
from backends.pause import pause
from backends.sglang import Server
from policies.clock import Clock
from policies.types import Role, Worker

log = structlog.get_logger("slackwater.webhook")

SCHEMA = "slackwater.change/1"
PENDING = "pending"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """The last word on a question."""

    why: str = ""
    by_another: bool = False
    worker: Mapping[str, Any] | None = None


class WebhookTurn:
    """The service does it, the server's own word counts: it is asked who it is afterwards."""

    def __init__(self, hook: Webhook, clock: Clock, rng: random.Random, roll: Roll) -> None:
        self.hook = hook
        self._clock = clock
        self._rng = rng
        self._roll = roll
        self._upstream: Upstream | None = None
        self._page = "/"
        self.size: Size | None = None
        self.at_once: int | None = None

    async def open(self) -> None:
        if not self.hook.url:
            raise UnfitError("ratio.webhook.url is missing")
        try:
            url = urlsplit(self.hook.url)
            self._page = (url.path or "/") + (f"?{url.query}" if url.query else "")
            origin = f"{url.scheme}://{url.netloc}"
            self._upstream = Upstream(origin, connect_timeout_s=self.hook.answer_s)
        except ValueError as error:
            raise UnfitError(f"ratio.webhook.url: {error}") from None

    async def close(self) -> None:
        if self._upstream is not None:
            self._upstream.close()

    async def problems(self, workers: Sequence[Worker]) -> list[str]:
        await self.open()
        try:
            found = await self.hindrance()
        finally:
            await self.close()
        return [] if found is None else [found.why]

    async def hindrance(self) -> Hindrance | None:
        number = self._rng.getrandbits(128)
        told = await self._put(_question("check", f"{number:032x}", self.hook.within_s))
        why = told.why if isinstance(told, _Told) else str(told)
        if not why:
            return None
        by_another = isinstance(told, _Told) and told.by_another
        why = f"the webhook does not say that it is done with a check: {why}"
        return Hindrance(why=why, by_another=by_another)

    async def turn(self, server: Server, role: Role) -> Turned:
        told = await self._settled("switch", server.worker, role)
        if told.worker is None:
            return Turned(why=told.why, by_another=told.by_another, is_restarted=not told.why)
        try:
            worker = _successor(server.worker, told.worker, role)
        except ValueError as error:
            return Turned(why=f"the webhook's answer: {error}", is_restarted=True)
        if worker.url == server.worker.url:
            return Turned(is_restarted=True)
        self._roll.come(worker)
        return Turned(is_gone=True, successor=worker.name)

    async def end(self, server: Server) -> str:
        return (await self._settled("end", server.worker, None)).why

    async def _settled(self, action: str, worker: Worker, role: Role | None) -> _Told:
        """Asked again while it is pending or nobody answers: the id makes it one question."""
        question = _question(action, f"{self._rng.getrandbits(128):032x}", self.hook.within_s)
        question["worker"] = {
            "name": worker.name,
            "url": worker.url,
            "model": worker.model,
            "role": worker.role.value,
        }
        if role is not None:
            question["role"] = role.value
        began_s = self._clock.time()
        last: str | HttpError = PENDING
        is_heard = is_away = False
        while self._clock.time() - began_s < self.hook.within_s:
            told = await self._put(question)
            if isinstance(told, _Told):
                return told
            last = told
            is_heard = is_heard or not _is_unheard(told)
            if not is_heard and self._clock.time() - began_s >= self.hook.answer_s:
                return _Told(why=f"nobody was there to ask: {told}")
            if told != PENDING and not is_away:
                log.warning("the webhook does not answer", worker=worker.name, error=str(told))
            is_away = told != PENDING
            await pause(self._clock, self.hook.poll_s)
        await self._put({**question, "action": "cancel"})
        return _Told(why=f"not over after {self.hook.within_s:.0f} s, last: {last}")

    async def _put(self, question: dict[str, Any]) -> _Told | str | HttpError:
        """The last word, or how far it is, or why nobody has said a thing."""
        assert self._upstream is not None
        body = orjson.dumps(question)
        headers = f"content-type: application/json\r\nidempotency-key: {question['id']}\r\n"
        if self.hook.secret:
            headers += f"x-slackwater-signature: {signature(self.hook.secret, body)}\r\n"
        try:
            answer = await fetch(
                self._upstream,
                b"POST",
                self._page.encode(),
                body,
                timeout_s=self.hook.answer_s,
                headers=headers.encode(),
            )
        except HttpError as error:
            return error
        return _read(answer.status, object_of(answer.body))


def _is_unheard(told: str | HttpError) -> bool:
    """Nothing can have come of a question that found nobody."""
    return isinstance(told, HttpError) and told.reason in (Reason.CONNECT, Reason.CONNECT_TIMEOUT)


def _question(action: str, key: str, within_s: float) -> dict[str, Any]:
    return {"schema": SCHEMA, "id": key, "action": action, "within_s": within_s}


def signature(secret: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def _read(status: int, told: Mapping[str, Any]) -> _Told | str:
    why = str(told.get("why") or f"the webhook answered {status}")
    if status == 409:
        return _Told(why=why, by_another=True)
    if status >= 500 or status == 429:
        return why
    match status, told.get("status"):
        case 200 | 202, "pending":
            return PENDING
        case 200, "done":
            worker = told.get("worker")
            return _Told(worker=worker if isinstance(worker, dict) else None)
        case _:
            return _Told(why=why)


def _successor(old: Worker, told: Mapping[str, Any], role: Role) -> Worker:
    """What it does not say is as it was."""
    url, port = told.get("url", old.url), told.get("bootstrap_port")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(f"worker.url must be http://HOST:PORT, got {url!r}")
    if port is not None and not (type(port) is int and 0 < port < 65536):
        raise ValueError(f"worker.bootstrap_port must be a port, got {port!r}")
    host = url.partition("://")[2].partition("/")[0]
    return replace(
        old,
        name=str(told.get("name") or host),
        url=url.rstrip("/"),
        role=role,
        host="",
        bootstrap_host=host.rpartition(":")[0] or host,
        bootstrap_port=port,
    )
