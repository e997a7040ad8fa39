"""The routes that the gateway answers by itself: health, metrics, aborts, and its servers."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import orjson
from aiohttp import hdrs, web

from backends.sglang import Sglang
from gateway.asking import secret_of
from gateway.config import Config, WorkerEntry, hardware_of, refuse_itself, worker_of
from gateway.core import Core
from gateway.costs import Hardware
from gateway.driver import Driver
from gateway.errors import ApiError, Code
from gateway.front import Front
from gateway.metrics import Metrics
from gateway.passing import Passing
from gateway.probe import Prober
from gateway.router import Handler, Route
from gateway.settings import ConfigError, decode
from policies.correction import Correction
from policies.events import WorkerDraining, WorkerGone
from policies.ledger import Ledger
from policies.steps import Steps
from policies.types import Kind, Role, Worker

_DRAINS = {"drain": True, "undrain": False}
_TYPES = {"regular": "unified", "unified": "unified", "prefill": "prefill", "decode": "decode"}


class Pages:
    def __init__(
        self,
        config: Config,
        front: Front,
        driver: Driver,
        backend: Sglang,
        prober: Prober,
        metrics: Metrics,
        passing: Passing,
        tasks: asyncio.TaskGroup,
        forget: Callable[[str], None],
    ) -> None:
        self._front = front
        self._driver = driver
        self._backend = backend
        self._prober = prober
        self._metrics = metrics
        self._passing = passing
        self._tasks = tasks
        self._forget = forget
        self._admin_key = config.server.admin_key
        self._host = config.server.host

    @property
    def _core(self) -> Core:
        return self._driver.core

    def routes(self) -> list[Route]:
        opened: list[Route] = [
            ("GET", "/liveness", self.liveness),
            *(("GET", path, self.readiness) for path in ("/health", "/readiness", "/ready")),
            ("GET", "/health_generate", self._passing.generates),
            ("GET", "/metrics", self.metrics),
        ]
        called: list[Route] = [
            ("POST", "/abort_request", self.abort),
            *self._passing.routes(),
        ]
        governed: list[Route] = [
            ("GET", "/workers", self.list_workers),
            ("POST", "/workers", self.add_worker),
            ("DELETE", "/workers/*", self.remove_worker),
            ("POST", "/workers/*", self.drain_worker),
            *((method, "/flush_cache", self._passing.flush) for method in ("GET", "POST")),
        ]
        return [
            *opened,
            *((method, path, self._guarded(handler)) for method, path, handler in called),
            *((m, path, self._guarded(handler, admin=True)) for m, path, handler in governed),
        ]

    def _guarded(self, handler: Handler, *, admin: bool = False) -> Handler:
        async def call(request: web.BaseRequest) -> web.StreamResponse:
            if admin and (self._admin_key or self._front.asks_for_keys):
                _check_admin(request, self._admin_key)
            else:
                self._front.caller(request)
            return await handler(request)

        return call

    # Health.

    async def liveness(self, _: web.BaseRequest) -> web.Response:
        return web.Response(text="OK")

    async def readiness(self, _: web.BaseRequest) -> web.Response:
        """Ready when some job could be served now; a load balancer looks here."""
        if self._front.draining:
            return web.Response(status=503, text="draining")
        now_us = self._backend.now_us()
        roles = {e.worker.role for e in self._core.ledgers.values() if e.usable(now_us)}
        if Role.UNIFIED in roles or {Role.PREFILL, Role.DECODE} <= roles:
            return web.Response(text="OK")
        return web.Response(status=503, text="no server is available")

    async def metrics(self, _: web.BaseRequest) -> web.Response:
        return web.Response(
            body=self._metrics.render(),
            headers={hdrs.CONTENT_TYPE: "text/plain; version=0.0.4; charset=utf-8"},
        )

    # Ends that clients ask for.

    async def abort(self, request: web.BaseRequest) -> web.Response:
        """As SGLang answers: 200 whatever the rid. Only a caller's own requests are found."""
        body = _object(await self._front.body_of(request))
        if body.get("abort_all"):
            message = "abort_all would end the requests of others: abort each rid of yours"
            raise ApiError(Code.UNSUPPORTED, message, param="abort_all")
        rid = body.get("rid")
        if not isinstance(rid, str) or not rid:
            raise ApiError(Code.INVALID_REQUEST, "rid must be a string", param="rid")
        self._front.abort(self._front.caller(request).tenant, rid)
        return web.Response()

    # Servers.

    async def list_workers(self, _: web.BaseRequest) -> web.Response:
        now_us = self._backend.now_us()
        ledgers = self._core.ledgers
        queued = {kind.value: self._core.queued(kind) for kind in Kind}
        workers = [_worker_page(ledgers[name], now_us) for name in sorted(ledgers)]
        return _json({"workers": workers, "total": len(workers), "queued": queued})

    async def add_worker(self, request: web.BaseRequest) -> web.Response:
        """The fields of [[worker]]; `worker_type` is understood as SGLang's router has it."""
        table = _object(await self._front.body_of(request))
        if (named := table.pop("worker_type", None)) is not None:
            if type(named) is not str or named not in _TYPES:
                known = ", ".join(_TYPES)
                raise ApiError(Code.INVALID_REQUEST, f"worker_type must be one of {known}")
            table["role"] = _TYPES[named]
        if table.get("bootstrap_port", 0) is None:
            del table["bootstrap_port"]
        try:
            entry = decode(WorkerEntry, table)
            worker = worker_of(entry, "worker")
            refuse_itself(worker, self._host, _port_of(request))
            if hardware_of(entry) != Hardware():
                raise ConfigError("cost_model, device and tp are read from config.toml only")
        except ConfigError as error:
            raise ApiError(Code.INVALID_REQUEST, str(error)) from None
        if not self._is_there(worker, entry.api_key):
            server = self._backend.add(worker, entry.api_key)
            self._prober.expect(worker)
            self._prober.watch(server, worker, self._tasks)
        return _json({"status": "accepted", "worker_id": worker.name, "url": worker.url}, 202)

    def _is_there(self, worker: Worker, api_key: str) -> bool:
        """Said twice it is one server; said otherwise, the one that serves stays what it is."""
        for server in self._backend.servers():
            if server.name == worker.name or server.worker.url == worker.url:
                if server.described == (worker, api_key):
                    return True
                raise ApiError(
                    Code.WORKER_EXISTS,
                    f"the worker {server.name} at {server.worker.url} is there already, described "
                    "otherwise: remove it first",
                    param="name" if server.name == worker.name else "url",
                )
        return False

    async def remove_worker(self, request: web.BaseRequest) -> web.Response:
        """Running requests end there as they would have; nothing new goes."""
        name = self._named(request.path)
        self._prober.forget(name)
        self._forget(name)
        self._driver.post(WorkerGone(name))
        self._backend.remove(name)
        return _json({"status": "removed", "worker_id": name}, 202)

    async def drain_worker(self, request: web.BaseRequest) -> web.Response:
        """Nothing new goes there, or, with `undrain`, again as before."""
        path, _, action = request.path.rpartition("/")
        if action not in _DRAINS:
            raise ApiError(Code.NOT_FOUND, f"there is no page {request.path}")
        name, draining = self._named(path), _DRAINS[action]
        self._driver.post(WorkerDraining(name, draining=draining))
        resident = self._core.ledgers[name].decodes + self._core.ledgers[name].prefills
        status = "draining" if draining else "serving"
        return _json({"status": status, "worker_id": name, "resident": resident}, 202)

    def _named(self, path: str) -> str:
        """By name or by address, as SGLang's router takes it."""
        given = unquote(path.removeprefix("/workers/"))
        for name, ledger in self._core.ledgers.items():
            if given in (name, ledger.worker.url):
                return name
        raise ApiError(Code.NOT_FOUND, f"no worker is called {given!r}")


def _port_of(request: web.BaseRequest) -> int:
    """Where it came in: the configured port may be 0."""
    here = request.transport.get_extra_info("sockname") if request.transport else None
    return int(here[1]) if here else 0


def _check_admin(request: web.BaseRequest, key: str) -> None:
    if not key:
        message = "closed: the gateway has keys for requests, but no server.admin_key"
        raise ApiError(Code.UNAUTHORIZED, message)
    if not hmac.compare_digest(key.encode(), secret_of(request.headers)):
        raise ApiError(Code.UNAUTHORIZED, "the admin key is needed: Authorization: Bearer KEY")


def _worker_page(ledger: Ledger, now_us: int) -> dict[str, Any]:
    worker, load = ledger.worker, ledger.load
    return {
        "id": worker.name,
        "url": worker.url,
        "role": worker.role.value,
        "pool": worker.pool.value,
        "model_id": worker.model,
        "bootstrap_port": worker.bootstrap_port,
        "is_healthy": ledger.up,
        "draining": ledger.is_leaving,
        "breaker": {
            "state": ledger.breaker.state,
            "failures_in_a_row": ledger.breaker.failures_in_a_row,
            "open_for_ms": max(0, ledger.breaker.open_until_us - now_us) // 1000,
        },
        "usable": ledger.usable(now_us),
        "stands_back": ledger.stands_back,
        "prefill_tokens": ledger.prefill_tokens,
        "decodes": ledger.decodes,
        "context_tokens": ledger.context_tokens,
        "reserved_tokens": ledger.reserved_tokens,
        "foreign_tokens": ledger.foreign_tokens,
        "kv_tokens": ledger.kv_tokens,
        "predicted": None if ledger.steps is None else _predicted(ledger.steps, now_us),
        "load_age_ms": None if load is None else (now_us - load.seen_us) // 1000,
    }


def _predicted(steps: Steps, now_us: int) -> dict[str, Any]:
    """What predicts its steps, and how far that had to be corrected."""
    return {
        "constants": steps.cost.source,
        **{phase: _correction(it, now_us) for phase, it in steps.corrections.items()},
    }


def _correction(correction: Correction, now_us: int) -> dict[str, Any]:
    return {
        "correction": round(correction.size, 4),
        "error": round(correction.error, 4),
        "steps": correction.steps,
        "age_ms": correction.age_us(now_us) // 1000 if correction.steps else None,
    }


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(Code.INVALID_JSON, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(Code.INVALID_REQUEST, "the body must be a JSON object")
    return body


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
