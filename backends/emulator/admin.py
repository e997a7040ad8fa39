"""The routes that describe and steer a server: health, info, load, abort, pause, role."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from backends.emulator import reports
from backends.emulator.exchange import json_response, settle
from backends.engine import MODES, Engine
from policies.types import Role

HEALTH_LATENCY_S = 1.0
HEALTH_TIMEOUT_S = 20.0
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
PAUSE_MODES = ("abort", "retract", "in_place")


class Admin:
    """Handlers beside inference; the unhealthy flag stays until a health check succeeds."""

    def __init__(self, engine: Engine, *, incremental: bool) -> None:
        self._engine = engine
        self._incremental = incremental
        self._healthy = True

    def add_routes(self, app: web.Application) -> None:
        get, post = app.router.add_get, app.router.add_post
        get("/health", self._health)
        get("/health_generate", self._health)
        get("/ready", self._ready)
        get("/ping", self._ping)
        get("/v1/models", self._models)
        get("/v1/loads", self._loads)
        get("/metrics", self._metrics)
        for path in ("/model_info", "/get_model_info"):
            get(path, self._model_info)
        for path in ("/server_info", "/get_server_info"):
            get(path, self._server_info)
        post("/abort_request", self._abort)
        post("/pause_generation", self._pause)
        post("/continue_generation", self._resume)
        post("/pd_role_switch", self._switch)
        for method in ("GET", "POST"):
            app.router.add_route(method, "/flush_cache", self._flush)
            app.router.add_route(method, "/slow_down", self._slow_down)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        """SGLang generates a token for this; a paused scheduler gives none."""
        await self._wait(HEALTH_LATENCY_S)
        self._healthy = not self._engine.paused
        if not self._healthy:
            await self._wait(HEALTH_TIMEOUT_S - HEALTH_LATENCY_S)
        return web.Response(status=200 if self._healthy else 503)

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        ready = self._healthy and not self._engine.paused
        return web.Response(status=200 if ready else 503)

    async def _ping(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if self._healthy else 503)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return json_response(reports.models(self._engine))

    async def _model_info(self, request: web.Request) -> web.StreamResponse:
        return json_response(reports.model_info(self._engine))

    async def _server_info(self, request: web.Request) -> web.StreamResponse:
        port = request.url.port or 0
        info = reports.server_info(self._engine, port=port, incremental=self._incremental)
        return json_response(info)

    async def _loads(self, request: web.Request) -> web.StreamResponse:
        include = [name for name in request.query.get("include", "").split(",") if name]
        if request.query.get("format") == "prometheus":
            return web.Response(text=reports.loads_as_text(self._engine))
        rank = request.query.get("dp_rank")
        try:
            answer = reports.loads(self._engine, include, None if rank is None else int(rank))
        except ValueError as error:
            return json_response({"detail": str(error)}, status=400)
        return json_response(answer)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=reports.metrics(self._engine))

    async def _abort(self, request: web.Request) -> web.StreamResponse:
        """Always 200 and empty, whatever the rid."""
        body = await self._body(request)
        if body.get("abort_all"):
            self._engine.abort_all()
        elif body.get("rid"):
            self._engine.abort(str(body["rid"]))
        return web.Response()

    async def _pause(self, request: web.Request) -> web.StreamResponse:
        mode = (await self._body(request)).get("mode", "abort")
        if mode not in PAUSE_MODES:
            why = f"mode must be one of {list(PAUSE_MODES)}"
            return json_response({"error": why}, status=400)
        self._engine.pause(mode)
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _resume(self, request: web.Request) -> web.StreamResponse:
        self._engine.resume()
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _flush(self, request: web.Request) -> web.StreamResponse:
        if self._engine.flush_cache():
            return web.Response(text=FLUSHED)
        return web.Response(text="Flush cache failed.\n", status=400)

    async def _slow_down(self, request: web.Request) -> web.StreamResponse:
        self._engine.slow_down((await self._body(request)).get("forward_sleep_time"))
        return web.Response()

    async def _switch(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        new_role = str(body.get("new_role"))
        answer: dict[str, Any] = {"old_role": MODES[self._engine.role], "new_role": new_role}
        refusal = self._engine.refuses_role(new_role)
        if refusal is not None:
            answer |= {"success": False, "message": refusal, "safe_to_restore": True}
            return json_response(answer, status=400)
        answer |= {"success": True, "safe_to_restore": True}
        if new_role == self._engine.role:
            return json_response(answer | {"message": "already in target role"})
        if body.get("prepare_only"):
            return json_response(answer | {"message": "ready"})
        switched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._engine.switch_role(Role(new_role), partial(settle, switched))
        await switched
        return json_response(answer | {"message": "ok"})

    async def _body(self, request: web.Request) -> dict[str, Any]:
        raw = await request.read()
        try:
            body = orjson.loads(raw) if raw else {}
        except orjson.JSONDecodeError:
            body = {}
        return body if isinstance(body, dict) else {}

    async def _wait(self, seconds: float) -> None:
        clock = self._engine.clock
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = clock.call_at(clock.time() + seconds, settle, over)
        try:
            await over
        finally:
            timer.cancel()
