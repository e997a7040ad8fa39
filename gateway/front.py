"""The routes that generate: from a client's bytes to jobs, and from the answers back to bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from operator import or_
from random import Random

from aiohttp import ClientPayloadError, hdrs, web

from backends.exchange import Client, Exchange
from backends.pause import pause
from backends.sglang import Sglang
from backends.transcript import Transcript
from gateway.asking import Caller, Keyring, job_of, kind_of
from gateway.chats import Chats
from gateway.clients import StreamClient, UnaryClient
from gateway.config import Config
from gateway.dialects import ROUTES, Ask, Dialect, Limits, assembled, read
from gateway.driver import Driver
from gateway.errors import ApiError, Code, invalid
from gateway.fanout import split
from gateway.log import WriteRequest
from gateway.metrics import Metrics
from gateway.prefixes import prefix_keys
from gateway.prompts import at_least
from gateway.report import fields_of, fields_of_refusal, header_lines
from gateway.router import REQUEST_ID, Route, refusal
from gateway.visit import Errand, FanOut, Part, Visit
from gateway.wire import Dates, Sent, head
from policies.clock import Clock
from policies.events import Arrived, Left
from policies.registry import PLACE
from policies.types import Kind, Resume

_EVENTS = "content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
_CHUNKED_LINES = f"{_EVENTS}transfer-encoding: chunked\r\n"
_UNCHUNKED_LINES = f"{_EVENTS}connection: close\r\n"
_CHUNKED_SINCE = (1, 1)
_FLUSH_POLL_S = 0.05
_PRIORITY = {Kind.ONLINE: 100, Kind.OFFLINE: 0}
_PATHS = {dialect: path.encode() for path, dialect in ROUTES.items()}


class Front:
    """Turns requests into jobs for the driver, and what comes of them into responses."""

    def __init__(
        self,
        config: Config,
        driver: Driver,
        backend: Sglang,
        metrics: Metrics,
        clock: Clock,
        rng: Random,
        write_line: WriteRequest,
    ) -> None:
        self._driver = driver
        self._backend = backend
        self._metrics = metrics
        self._rng = rng
        self._write_line = write_line
        self._clock = clock
        self._dates = Dates(clock)
        self._visits: dict[str, Visit] = {}
        self._by_rid: dict[tuple[str, str], Visit] = {}
        self._chats = Chats(backend, rng)
        self.draining = False
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Everything that a reload may change here."""
        limits = config.limits
        self._classes, self._timeouts, self._log = config.classes, config.timeouts, config.log
        self._by_prefix = PLACE[config.policies.place]().by_prefix
        self.body_timeout_s = config.server.body_timeout_s
        self._keys = Keyring(config.key)
        chat = config.chat
        self._chats.adopt(resumes=chat.resume, generation_config=chat.generation_config)
        self._limits = Limits(
            max_tokens=limits.max_tokens,
            default_max_tokens=limits.default_max_tokens,
            max_prompts=limits.max_fan_out,
            max_samples=limits.max_fan_out,
            max_asks=limits.max_fan_out,
        )

    def routes(self) -> list[Route]:
        return [
            (hdrs.METH_POST, path, self.generate)
            for path, dialect in ROUTES.items()
            if dialect is not Dialect.EMBEDDINGS
        ]

    @property
    def asks_for_keys(self) -> bool:
        return self._keys.asks

    def caller(self, request: web.BaseRequest) -> Caller:
        return self._keys.caller(request.headers)

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._visits)

    async def generate(self, request: web.BaseRequest) -> web.StreamResponse:
        dialect = ROUTES[request.path]
        request_id = _request_id(request) or self._new_id()
        try:
            visit = await self._admit(request, dialect, request_id)
        except ApiError as error:
            self._note_refusal(request, error, request_id)
            return refusal(dialect, error, request_id)
        self._begin(visit)
        try:
            if isinstance(visit.client, StreamClient):
                return await self._stream(request, visit, visit.client)
            return await self._whole(request, visit, visit.client)
        finally:
            self._leave(visit)

    def _new_id(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    # From a request to jobs.

    async def _admit(self, request: web.BaseRequest, dialect: Dialect, request_id: str) -> Visit:
        if self.draining:
            raise ApiError(Code.GATEWAY_DRAINING, "the gateway is shutting down", retry_after_s=1)
        caller = self._keys.caller(request.headers)
        ask = read(dialect, await self.body_of(request), limits=self._limits)
        kind = kind_of(request.headers, ask, caller, self._classes.default)
        rid = ask.body.get("rid") or ""
        if isinstance(rid, list):
            rid = rid[0] if len(rid) == 1 else ""
        if rid and (caller.tenant, rid) in self._by_rid:
            raise ApiError(Code.DUPLICATE_RID, "a request with this rid is under way", param="rid")
        client = self._client(request, lambda: visit, ask)
        visit = Visit(request_id, caller.tenant, kind, ask, rid, client, [])
        return self._divide(visit, request.headers)

    def enter(self, errand: Errand) -> Visit:
        """A request from inside the gateway, which has no socket: otherwise one like any other."""
        if self.draining:
            raise ApiError(Code.GATEWAY_DRAINING, "the gateway is shutting down", retry_after_s=1)
        ask = read(errand.dialect, errand.body, limits=self._limits)
        if ask.stream:
            raise invalid("stream", "cannot be true: nobody reads while it is made")
        ask = assembled(ask)
        caller = Caller(errand.tenant, Kind.OFFLINE)
        kind = kind_of({}, ask, caller, self._classes.default)
        client = UnaryClient(asyncio.get_running_loop())
        visit = Visit(errand.request_id, errand.tenant, kind, ask, "", client, [])
        self._divide(visit, {})
        for part in visit.parts:
            part.job = part.job._replace(deadline_us=errand.due_us, give_up_us=errand.due_us)
        if errand.earlier is not None and visit.is_resumable:
            visit.parts[0].go_on_from(errand.earlier)
        self._begin(visit)
        return visit

    def _divide(self, visit: Visit, headers: Mapping[str, str]) -> Visit:
        ask, client = visit.ask, visit.client
        model = self.model_of(ask.model)
        if not ask.fans_out:
            self._check_length(ask, model)
            visit.parts.append(self._part(headers, visit, ask, client, model))
            return visit
        asks = split(ask)
        whole = FanOut(ask, client, len(asks), lambda: self._drop_jobs(visit))
        for index, one in enumerate(asks):
            self._check_length(one, model)
            visit.parts.append(self._part(headers, visit, one, whole.part(index), model))
        return visit

    def _part(
        self, headers: Mapping[str, str], visit: Visit, ask: Ask, client: Client, model: str
    ) -> Part:
        kind, timeouts = visit.kind, self._timeouts
        job = job_of(
            ask,
            job_id=self._new_id(),
            kind=kind,
            model=model,
            headers=headers,
            classes=self._classes,
            now_us=self._backend.now_us(),
        )
        if self._by_prefix:
            job = job._replace(prefixes=prefix_keys(ask))
        rid = ask.body.pop("rid", None) or ""
        online = kind is Kind.ONLINE
        first_s = timeouts.first_token_online_s if online else timeouts.first_token_offline_s
        # A whole answer is asked for as a stream where it may have to be resumed.
        assembles = not ask.stream and ask.resumable and kind is Kind.OFFLINE
        transcript = None
        if ask.resumable and (ask.stream or assembles):
            transcript = Transcript.of(ask.body)
            job = job._replace(resume=Resume.EXACT)
        exchange = Exchange(
            job_id=job.id,
            path=_PATHS[ask.dialect],
            dialect=ask.dialect.value,
            body=ask.body,
            stream=ask.stream or assembles,
            assembles=assembles,
            client=client,
            request_id=visit.request_id,
            client_rid=rid if isinstance(rid, str) else rid[0],
            priority=_PRIORITY[kind] if ask.priority is None else ask.priority,
            transcript=transcript,
            first_token_timeout_s=first_s,
            whole_timeout_s=first_s + job.max_tokens * timeouts.per_token_s,
        )
        if (turn := self._chats.turn(ask, kind, model)) is not None:
            job = self._chats.as_ids(exchange, job, turn)
        return Part(job, exchange)

    def _check_length(self, ask: Ask, model: str) -> None:
        """What every server would refuse need not wait for one; in doubt they are asked."""
        known = self._backend.context_tokens
        longest = known.get(model) or known.get("", 0)
        if longest and (tokens := at_least(ask.dialect, ask.body, ask.prompt_tokens)) >= longest:
            raise ApiError(
                Code.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has at least {tokens} tokens, the model's context length is {longest}",
            )

    def model_of(self, named: str) -> str:
        """A model that no server has is refused, unless some server did not say what it has: that
        one may have it, and those of other models have not."""
        models = self._backend.models
        if not named or named in models or not models or "" in models:
            return named
        raise ApiError(
            Code.UNKNOWN_MODEL,
            f"the model {named!r} is not served here; known: {', '.join(sorted(models))}",
            param="model",
        )

    async def body_of(self, request: web.BaseRequest) -> bytes:
        try:
            if request.content.is_eof():
                return self._body_at_hand(request)
            async with asyncio.timeout(self.body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise ApiError(Code.REQUEST_TIMEOUT, "the body did not arrive in time") from None
        except (web.RequestPayloadError, ClientPayloadError):
            raise ApiError(Code.INVALID_REQUEST, "the body is not encoded as it says") from None
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(Code.BODY_TOO_LARGE, "the body is too large for this gateway") from None

    def _body_at_hand(self, request: web.BaseRequest) -> bytes:
        """It came with the headers, as most do: there is nothing to wait for."""
        body = request.content.read_nowait()
        if len(body) > request.client_max_size:
            raise ApiError(Code.BODY_TOO_LARGE, "the body is too large for this gateway")
        return body

    # From answers to a response.

    async def _whole(
        self, request: web.BaseRequest, visit: Visit, client: UnaryClient
    ) -> web.StreamResponse:
        await client.over
        if client.error is not None:
            return self._refuse(visit, client.error)
        self._end(visit, _outcome(visit))
        if (transport := request.transport) is None:
            raise ConnectionResetError("the client is gone")
        body = client.body
        lines = f"content-type: {client.content_type}\r\ncontent-length: {len(body)}\r\n"
        transport.write(self._head(request, visit, client.status, lines) + body)
        return Sent(keep_alive=request.keep_alive)

    async def _stream(
        self, request: web.BaseRequest, visit: Visit, client: StreamClient
    ) -> web.StreamResponse:
        await client.over
        if client.error is not None and not client.begun:
            return self._refuse(visit, client.error)
        await self._flushed(request)
        if client.error is None:
            self._end(visit, _outcome(visit))
        else:
            self._end(visit, client.error.code, client.error.message)
        return Sent(keep_alive=request.keep_alive and request.version >= _CHUNKED_SINCE)

    async def _flushed(self, request: web.BaseRequest) -> None:
        """What aiohttp does not know of must be out before it goes on with the connection."""
        until_s = self._backend.now_s() + self._timeouts.client_stall_s
        while (transport := request.transport) is not None and transport.get_write_buffer_size():
            if self._backend.now_s() > until_s:
                transport.abort()
                raise ConnectionResetError("the client has stopped to read")
            await pause(self._clock, _FLUSH_POLL_S)

    def _client(
        self, request: web.BaseRequest, visit_of: Callable[[], Visit], ask: Ask
    ) -> StreamClient | UnaryClient:
        loop = asyncio.get_running_loop()
        if not ask.stream:
            return UnaryClient(loop)
        if (transport := request.transport) is None:
            raise ConnectionResetError("the client is gone")
        chunked = request.version >= _CHUNKED_SINCE
        lines = _CHUNKED_LINES if chunked else _UNCHUNKED_LINES
        return StreamClient(
            loop,
            transport,
            lambda: self._head(request, visit_of(), 200, lines),
            dialect=ask.dialect,
            chunked=chunked,
        )

    def _head(self, request: web.BaseRequest, visit: Visit, status: int, lines: str) -> bytes:
        closing = "" if request.keep_alive else "connection: close\r\n"
        return head(status, f"{header_lines(visit)}{lines}{self._dates.line()}{closing}")

    def _note_refusal(self, request: web.BaseRequest, error: ApiError, request_id: str) -> None:
        """A request that became no job is told of, too: wrong keys and bad bodies are news."""
        self._metrics.refused(error.code)
        if self._log.requests:
            self._write_line(fields_of_refusal(request.path, error, request_id))

    def _refuse(self, visit: Visit, error: ApiError) -> web.Response:
        self._end(visit, error.code, error.message)
        return refusal(visit.ask.dialect, error, visit.request_id)

    # A visit's beginning and end.

    def _begin(self, visit: Visit) -> None:
        self._visits[visit.parts[0].job.id] = visit
        if visit.rid:
            self._by_rid[visit.tenant, visit.rid] = visit
        for part in visit.parts:
            self._backend.open(part.exchange)
            self._driver.post(Arrived(part.job))

    async def answer_to(self, visit: Visit) -> UnaryClient:
        """Of a request from inside. Whoever waits for it may be cancelled, and it is forgotten."""
        client = visit.client
        assert isinstance(client, UnaryClient)
        try:
            await client.over
            if client.error is None:
                self._end(visit, _outcome(visit))
            else:
                self._end(visit, client.error.code, client.error.message)
            return client
        finally:
            self._leave(visit)

    def _leave(self, visit: Visit) -> None:
        """However it ended: what still works for a client that is gone stops."""
        if visit.parts[0].job.id in self._visits:
            self._drop_jobs(visit)
            self._end(visit, Code.REQUEST_CANCELLED)

    def _drop_jobs(self, visit: Visit) -> None:
        for part in visit.parts:
            self._backend.forget(part.job.id)
            self._driver.post(Left(part.job.id))

    def _end(self, visit: Visit, outcome: str, why: str = "") -> None:
        if self._visits.pop(visit.parts[0].job.id, None) is None:
            return
        if visit.rid:
            self._by_rid.pop((visit.tenant, visit.rid), None)
        for part in visit.parts:
            self._metrics.record(part.exchange, part.job, outcome)
        if self._log.requests:
            self._write_line(fields_of(visit, outcome, why))

    # Ends that others ask for.

    def abort(self, tenant: str, rid: str) -> bool:
        """A client's own abort: servers end what they run, and their last words are the answer."""
        visit = self._by_rid.get((tenant, rid))
        if visit is None:
            return False
        reached = [self._backend.abort(part.job.id) for part in visit.parts]
        ended = [part.exchange.timeline.ended_us > 0 for part in visit.parts]
        if not all(map(or_, reached, ended)):
            self._cut(visit, ApiError(Code.REQUEST_CANCELLED, "the request was aborted"))
        return True

    def cut_off(self) -> None:
        """The time for running requests is over."""
        error = ApiError(Code.GATEWAY_DRAINING, "the gateway is shutting down", retry_after_s=1)
        for visit in list(self._visits.values()):
            self._cut(visit, error)

    def _cut(self, visit: Visit, error: ApiError) -> None:
        visit.client.ended(error)
        self._drop_jobs(visit)


def _outcome(visit: Visit) -> str:
    """Of an answer that came: its client may have asked for its end."""
    aborted = any(part.exchange.aborted for part in visit.parts)
    return Code.REQUEST_CANCELLED if aborted else "ok"


def _request_id(request: web.BaseRequest) -> str:
    """The caller's own id, where it can stand in a header and a log line."""
    given = request.headers.get(REQUEST_ID, "")
    return given if len(given) <= 128 and given.isascii() and given.isprintable() else ""
