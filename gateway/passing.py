"""The routes that servers answer: which one is asked, and what is said when none can."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import unquote

import orjson
from aiohttp import hdrs, web

from backends.fetch import Answer, fetch
from backends.http import HttpError, Reason
from backends.sglang import Server, Sglang
from gateway.core import Core
from gateway.errors import ApiError, Code
from gateway.front import Front
from gateway.router import REQUEST_ID, Route
from gateway.terminal import counted
from gateway.trial import Route as Way
from gateway.trial import try_out
from policies.clock import Clock
from policies.types import Role

_ANY_SERVER = (
    "/v1/tokenize",
    "/tokenize",
    "/v1/detokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/parse_function_call",
    "/separate_reasoning",
)
_UNIFIED_SERVER = (
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v1/classify",
    "/classify",
    "/encode",
)
_INFO = ("/get_model_info", "/model_info", "/get_server_info", "/server_info")
_MODELS = "/v1/models"
_READ_TIMEOUT_S = 5.0
_FLUSH_TIMEOUT_S = 30.0
_TOKEN_TIMEOUT_S = 20.0
"""As long as SGLang's own /health_generate waits for a token."""
NOT_SENT = frozenset({Reason.CONNECT, Reason.CONNECT_TIMEOUT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an answer may take."""

    timeout_s: float
    max_bytes: int


_OF_CLIENTS = Bounds(timeout_s=120.0, max_bytes=16 << 20)


class Passing:
    """Asks servers what the gateway cannot know. A scheduler need not see these calls."""

    def __init__(
        self, front: Front, core: Core, backend: Sglang, clock: Clock, rng: Random
    ) -> None:
        self._front = front
        self._core = core
        self._backend = backend
        self._clock = clock
        self._rng = rng
        self._turn = asyncio.Lock()
        self._tried_s = 0.0
        self._trouble = ""

    def routes(self) -> list[Route]:
        return [
            ("GET", _MODELS, self.models),
            ("GET", f"{_MODELS}/*", self.model),
            *(("GET", path, self.info) for path in _INFO),
            *(("POST", path, self.pass_any) for path in _ANY_SERVER),
            *(("POST", path, self.pass_unified) for path in _UNIFIED_SERVER),
        ]

    # Reading.

    async def models(self, _: web.BaseRequest) -> web.Response:
        return _json({"object": "list", "data": list((await self._cards()).values())})

    async def model(self, request: web.BaseRequest) -> web.Response:
        named = unquote(request.path.removeprefix(f"{_MODELS}/"))
        cards = await self._cards()
        if named in cards:
            return _json(cards[named])
        if not cards:
            raise _unavailable("no server is available that could name its models")
        known = ", ".join(sorted(cards))
        message = f"the model {named!r} is not served here; known: {known}"
        raise ApiError(Code.UNKNOWN_MODEL, message, param="model")

    async def _cards(self) -> dict[str, Any]:
        """The models of all servers, each once, in the words of the first that has it."""
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._cards_of(server)) for server in self._usable()]
        known: dict[str, Any] = {}
        for task in asked:
            known = task.result() | known
        return known

    @staticmethod
    async def _cards_of(server: Server) -> dict[str, Any]:
        try:
            path = _MODELS.encode()
            answer = await fetch(server.upstream, b"GET", path, timeout_s=_READ_TIMEOUT_S)
            cards = orjson.loads(answer.body)["data"] if answer.status == 200 else ()
            return {card["id"]: card for card in cards}
        except (HttpError, ValueError, KeyError, TypeError):
            return {}

    async def info(self, request: web.BaseRequest) -> web.Response:
        """The first server that answers: a question is asked again without harm."""
        trouble: HttpError | None = None
        for server in self._usable():
            try:
                path = request.path_qs.encode()
                answer = await fetch(server.upstream, b"GET", path, timeout_s=_READ_TIMEOUT_S)
            except HttpError as error:
                trouble = error
            else:
                return _passed_on(request, answer)
        raise _unavailable("no server is available") if trouble is None else failed(trouble)

    # Work.

    async def pass_any(self, request: web.BaseRequest) -> web.Response:
        body = await self._front.body_of(request)
        servers = self._of_model(self._usable(), body)
        return await _told(request, self._pass(request.path, servers, body, _OF_CLIENTS))

    async def pass_unified(self, request: web.BaseRequest) -> web.Response:
        body = await self._front.body_of(request)
        return await _told(request, self.answer_of_unified(request.path, body, _OF_CLIENTS))

    async def answer_of_unified(self, path: str, body: bytes, bounds: Bounds) -> Answer:
        """Or HttpError, where a server has not answered."""
        roles = {ledger.worker.role for ledger in self._core.ledgers.values()}
        if roles and Role.UNIFIED not in roles:
            raise ApiError(
                Code.NEEDS_UNIFIED_SERVER,
                f"{path} needs a unified server: prefill and decode servers do not "
                "answer it, and the gateway has no other",
            )
        servers = [s for s in self._usable() if s.worker.role is Role.UNIFIED]
        return await self._pass(path, self._of_model(servers, body), body, bounds)

    def _of_model(self, servers: list[Server], body: bytes) -> list[Server]:
        """Another model's server would answer with another model's tokens."""
        try:
            named = orjson.loads(body).get("model")
        except (orjson.JSONDecodeError, AttributeError):
            return servers  # whoever reads it says what is wrong with it
        if not isinstance(named, str) or not (model := self._front.model_of(named)):
            return servers
        return [server for server in servers if server.worker.model in ("", model)]

    async def _pass(
        self, path: str, servers: Sequence[Server], body: bytes, bounds: Bounds
    ) -> Answer:
        """Work that may have begun at one server is not given to another, too."""
        trouble: HttpError | None = None
        for server in servers:
            try:
                answer = await fetch(
                    server.upstream,
                    b"POST",
                    path.encode(),
                    body,
                    timeout_s=bounds.timeout_s,
                    max_bytes=bounds.max_bytes,
                )
            except HttpError as error:
                if error.reason not in NOT_SENT:
                    raise
                trouble = error
            else:
                if answer.status == 404 and not _says_why(answer.body):
                    raise ApiError(Code.NOT_FOUND, f"{server.name} has no page {path}")
                return answer
        if trouble is None:
            raise _unavailable(f"no server that could answer {path} is available")
        raise trouble

    # What operators and load balancers ask for.

    async def flush(self, request: web.BaseRequest) -> web.Response:
        """All servers forget their cached prefixes; SGLang refuses while something runs there."""
        servers = sorted(self._backend.servers(), key=lambda server: server.name)
        path = request.path_qs.encode()
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._flush(server, path)) for server in servers]
        refused = [
            f"{server.name}: {trouble}"
            for server, task in zip(servers, asked, strict=True)
            if (trouble := task.result())
        ]
        if refused:
            done = len(servers) - len(refused)
            message = f"{done} of {len(servers)} servers flushed; {'; '.join(refused)}"
            raise ApiError(Code.UPSTREAM_REJECTED, message)
        if not servers:
            raise _unavailable("there is no server to flush")
        return web.Response(text=f"Cache flushed on {counted(len(servers), 'server')}.\n")

    @staticmethod
    async def _flush(server: Server, path: bytes) -> str:
        """What is in the way; nothing, if it is done."""
        try:
            answer = await fetch(server.upstream, b"POST", path, timeout_s=_FLUSH_TIMEOUT_S)
        except HttpError as error:
            return str(error)
        said = answer.body.decode(errors="replace").strip()
        return "" if answer.status == 200 else said or f"status {answer.status}"

    async def generates(self, _: web.BaseRequest) -> web.Response:
        """Whether a token comes out, as SGLang's page of this name tells.

        Many may ask at once: those that wait for a trial share the next one.
        """
        asked_s = self._clock.time()
        async with self._turn:
            if self._tried_s < asked_s:
                self._tried_s = self._clock.time()
                self._trouble = await self._try_out()
            trouble = self._trouble
        return web.Response(status=503 if trouble else 200, text=trouble or "OK")

    async def _try_out(self) -> str:
        way = self._way()
        if way is None:
            return "no server is available"
        rid, room = f"health-{self._rng.getrandbits(64):016x}", self._rng.getrandbits(62) + 1
        return (await try_out(way, rid, room, _TOKEN_TIMEOUT_S, self._clock)).error

    def _way(self) -> Way | None:
        """The least busy pair, or unified server."""
        usable = self._usable()
        for server in usable:
            if server.worker.role is Role.UNIFIED:
                return Way(prefill=None, decode=server)
            if server.worker.role is Role.PREFILL:
                models = ("", server.worker.model)
                for other in usable:
                    is_decode = other.worker.role is Role.DECODE
                    if is_decode and (other.worker.model in models or not server.worker.model):
                        return Way(prefill=server, decode=other)
        return None

    def _usable(self) -> list[Server]:
        """Least busy first."""
        now_us, ledgers = self._backend.now_us(), self._core.ledgers
        # The core hears a little later than the backend that a server has come or gone.
        known = [(ledgers[s.name], s) for s in self._backend.servers() if s.name in ledgers]
        usable = [(ledger, server) for ledger, server in known if ledger.usable(now_us)]
        usable.sort(key=lambda pair: (pair[0].decodes + pair[0].prefills, pair[1].name))
        return [server for _, server in usable]


async def _told(request: web.BaseRequest, asked: Coroutine[None, None, Answer]) -> web.Response:
    try:
        return _passed_on(request, await asked)
    except HttpError as error:
        raise failed(error) from None


def _passed_on(request: web.BaseRequest, answer: Answer) -> web.Response:
    headers: dict[str, str] = {hdrs.CONTENT_TYPE: answer.content_type or "application/json"}
    request_id = request.headers.get(REQUEST_ID, "")
    if request_id.isascii() and request_id.isprintable() and request_id:
        headers[REQUEST_ID] = request_id
    return web.Response(body=answer.body, status=answer.status, headers=headers)


def _says_why(body: bytes) -> bool:
    """An error of the page itself has a message; that there is no such page needs our own."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(told, dict) and not told.keys().isdisjoint({"error", "message"})


def failed(trouble: HttpError) -> ApiError:
    late = trouble.reason is Reason.TIMEOUT
    code = Code.UPSTREAM_TIMEOUT if late else Code.UPSTREAM_FAILED
    return ApiError(code, str(trouble), retry_after_s=1)


def _unavailable(message: str) -> ApiError:
    return ApiError(Code.WORKERS_UNAVAILABLE, message, retry_after_s=1)


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
