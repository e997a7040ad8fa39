"""The routes that generate: from a client's bytes to a job, and from the answer back to bytes."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import structlog
from aiohttp import hdrs, web

from backends.exchange import Exchange
from backends.sglang import Sglang
from gateway.asking import Caller, Keyring, job_of, kind_of
from gateway.clients import StreamClient, UnaryClient
from gateway.config import Config
from gateway.dialects import ROUTES, Ask, Dialect, Limits, read
from gateway.driver import Driver
from gateway.errors import ApiError, Code, error_body, error_event
from gateway.metrics import Metrics
from policies.events import Arrived, Left
from policies.types import Job, Kind

_REQUEST_ID = "x-request-id"
_STREAM_TYPES = {hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_PRIORITY = {Kind.ONLINE: 100, Kind.OFFLINE: 0}

log = structlog.get_logger("slackwater.request")


@dataclass(slots=True)
class Visit:
    """One HTTP request while it is served."""

    request_id: str
    dialect: Dialect
    ask: Ask
    caller: Caller
    job: Job
    exchange: Exchange


class Front:
    """Turns requests into jobs for the driver, and what comes of them into responses."""

    def __init__(
        self,
        config: Config,
        driver: Driver,
        backend: Sglang,
        metrics: Metrics,
        rng: random.Random,
    ) -> None:
        self._driver = driver
        self._backend = backend
        self._metrics = metrics
        self._rng = rng
        self._visits: dict[str, Visit] = {}
        self._by_rid: dict[tuple[str, str], str] = {}
        self.draining = False
        self.adopt(config)

    def adopt(self, config: Config) -> None:
        """Everything that a reload may change here."""
        limits = config.limits
        self._classes, self._timeouts, self._log = config.classes, config.timeouts, config.log
        self._body_timeout_s = config.server.body_timeout_s
        self._keys = Keyring(config.key)
        self._limits = Limits(
            max_tokens=limits.max_tokens,
            default_max_tokens=limits.default_max_tokens,
            max_samples=limits.max_fan_out,
            max_asks=limits.max_fan_out,
        )

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(path, self.generate)
            for path, dialect in ROUTES.items()
            if dialect is not Dialect.EMBEDDINGS
        ]

    def caller(self, request: web.Request) -> Caller:
        return self._keys.caller(request.headers)

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._visits)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        dialect = ROUTES[request.path]
        request_id = _request_id(request) or f"{self._rng.getrandbits(128):032x}"
        try:
            visit = await self._admit(request, dialect, request_id)
        except ApiError as error:
            return refusal(dialect, error, request_id)
        if visit.ask.stream:
            return await self._stream(request, visit)
        return await self._whole(visit)

    async def _admit(self, request: web.Request, dialect: Dialect, request_id: str) -> Visit:
        if self.draining:
            raise ApiError(Code.GATEWAY_DRAINING, "the gateway is shutting down", retry_after_s=1)
        caller = self._keys.caller(request.headers)
        ask = read(dialect, await self.body_of(request), limits=self._limits)
        kind = kind_of(request.headers, ask, caller, self._classes.default)
        model = self._model(ask.model)
        job_id = f"{self._rng.getrandbits(128):032x}"
        now_us = self._backend.now_us()
        job = job_of(
            ask,
            job_id=job_id,
            kind=kind,
            model=model,
            headers=request.headers,
            classes=self._classes,
            now_us=now_us,
        )
        client_rid = ask.body.pop("rid", None) or ""
        if client_rid and (caller.tenant, client_rid) in self._by_rid:
            raise ApiError(Code.DUPLICATE_RID, "a request with this rid is under way", param="rid")
        return Visit(request_id, dialect, ask, caller, job, self._exchange(ask, job, client_rid))

    def _exchange(self, ask: Ask, job: Job, client_rid: str) -> Exchange:
        loop = asyncio.get_running_loop()
        online = job.kind is Kind.ONLINE
        timeouts = self._timeouts
        return Exchange(
            job_id=job.id,
            path=_PATHS[ask.dialect],
            dialect=ask.dialect.value,
            body=ask.body,
            stream=ask.stream,
            client=StreamClient(loop) if ask.stream else UnaryClient(loop),
            client_rid=client_rid,
            priority=_PRIORITY[job.kind] if ask.priority is None else ask.priority,
            first_token_timeout_s=timeouts.first_token_online_s
            if online
            else timeouts.first_token_offline_s,
        )

    def _model(self, named: str) -> str:
        """A model that no server has is refused, unless some server did not say what it has."""
        models = {server.worker.model for server in self._backend.servers()}
        if not named or named in models or not models:
            return named if named in models else ""
        if "" in models:
            return ""
        raise ApiError(
            Code.UNKNOWN_MODEL,
            f"the model {named!r} is not served here; known: {', '.join(sorted(models))}",
            param="model",
        )

    async def body_of(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise ApiError(Code.REQUEST_TIMEOUT, "the body did not arrive in time") from None
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(Code.BODY_TOO_LARGE, "the body is too large for this gateway") from None

    # Answers.

    async def _whole(self, visit: Visit) -> web.Response:
        client = visit.exchange.client
        assert isinstance(client, UnaryClient)
        self._begin(visit)
        try:
            await client.over
        except asyncio.CancelledError:
            self._leave(visit)
            raise
        if client.error is not None:
            self._end(visit, client.error.code)
            return refusal(visit.dialect, client.error, visit.request_id)
        self._end(visit, "ok")
        return web.Response(
            body=client.body,
            status=client.status,
            content_type=client.content_type,
            headers=_headers(visit),
        )

    async def _stream(self, request: web.Request, visit: Visit) -> web.StreamResponse:
        client = visit.exchange.client
        assert isinstance(client, StreamClient)
        self._begin(visit)
        try:
            await client.begun
            if client.error is not None:
                self._end(visit, client.error.code)
                return refusal(visit.dialect, client.error, visit.request_id)
            response = web.StreamResponse(headers=_headers(visit) | _STREAM_TYPES)
            if request.version >= (1, 1):
                response.enable_chunked_encoding()
            else:
                response.force_close()
            await response.prepare(request)
            await client.attach(response, request)
            await client.over
            client.detach()
            if client.error is not None:
                await response.write(error_event(visit.dialect, client.error))
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            client.detach()
            self._leave(visit)
            raise
        self._end(visit, "ok" if client.error is None else client.error.code)
        return response

    def _begin(self, visit: Visit) -> None:
        self._visits[visit.job.id] = visit
        if visit.exchange.client_rid:
            self._by_rid[visit.caller.tenant, visit.exchange.client_rid] = visit.job.id
        self._backend.open(visit.exchange)
        self._driver.post(Arrived(visit.job))

    def _leave(self, visit: Visit) -> None:
        """The client is gone: whatever still works for it stops."""
        self._driver.post(Left(visit.job.id))
        self._end(visit, Code.REQUEST_CANCELLED)

    def _end(self, visit: Visit, outcome: str) -> None:
        if self._visits.pop(visit.job.id, None) is None:
            return
        if visit.exchange.client_rid:
            self._by_rid.pop((visit.caller.tenant, visit.exchange.client_rid), None)
        self._metrics.record(visit.exchange, visit.job, outcome)
        if self._log.requests:
            _log_line(visit, outcome)

    # A client's own abort.

    def abort(self, tenant: str, rid: str) -> bool:
        job_id = self._by_rid.get((tenant, rid))
        if job_id is None:
            return False
        if not self._backend.abort(job_id):
            # It waits in the queue: nobody has an answer for it, so there is none.
            self._visits[job_id].exchange.client.cancelled()
            self._driver.post(Left(job_id))
        return True

    def cut_off(self) -> None:
        """The time for running requests is over: each ends as if its client had left."""
        for visit in list(self._visits.values()):
            visit.exchange.client.cancelled()
            self._driver.post(Left(visit.job.id))


_PATHS = {dialect: path.encode() for path, dialect in ROUTES.items()}


def refusal(dialect: Dialect, error: ApiError, request_id: str) -> web.Response:
    headers = {_REQUEST_ID: request_id}
    if error.retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(error.retry_after_s)
    return web.Response(
        body=error_body(dialect, error, request_id=request_id),
        status=error.status,
        content_type="application/json",
        headers=headers,
    )


def _request_id(request: web.Request) -> str:
    """The caller's own id, where it can stand in a header and a log line."""
    given = request.headers.get(_REQUEST_ID, "")
    return given if len(given) <= 128 and given.isascii() and given.isprintable() else ""


def _headers(visit: Visit) -> dict[str, str]:
    exchange = visit.exchange
    return {
        _REQUEST_ID: visit.request_id,
        "server-timing": _server_timing(exchange),
        "x-slackwater-class": visit.job.kind.value,
        "x-slackwater-worker": f"{exchange.prefill},{exchange.decode}"
        if exchange.prefill
        else exchange.decode,
    }


def _server_timing(exchange: Exchange) -> str:
    """How the time was spent so far, in milliseconds, as browsers and proxies read it."""
    times = exchange.timeline
    spans = [("queue", times.arrived_us, times.dispatched_us)]
    if times.prefilled_us:
        spans.append(("prefill", times.dispatched_us, times.prefilled_us))
        spans.append(("transfer", times.prefilled_us, times.first_token_us))
    else:
        spans.append(("prefill", times.dispatched_us, times.first_token_us))
    spans.append(("decode", times.first_token_us or times.prefilled_us, times.ended_us))
    return ", ".join(
        f"{name};dur={(end - start) / 1000:.1f}"
        for name, start, end in spans
        if start and end > start
    )


def _log_line(visit: Visit, outcome: str) -> None:
    exchange, job = visit.exchange, visit.job
    times = exchange.timeline
    log.info(
        "request",
        request_id=visit.request_id,
        job=job.id,
        path=exchange.path.decode(),
        kind=job.kind.value,
        tenant=visit.caller.tenant,
        outcome=outcome,
        prefill=exchange.prefill,
        decode=exchange.decode,
        attempts=exchange.attempts,
        prompt_tokens=job.prompt_tokens,
        tokens=exchange.tokens,
        queue_ms=_ms(times.arrived_us, times.dispatched_us),
        prefill_ms=_ms(times.dispatched_us, times.prefilled_us),
        ttft_ms=_ms(times.arrived_us, times.first_token_us),
        total_ms=_ms(times.arrived_us, times.ended_us),
    )


def _ms(start_us: int, end_us: int) -> float | None:
    return round((end_us - start_us) / 1000, 2) if start_us and end_us else None
