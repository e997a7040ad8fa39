"""Asks each server who it is and how loaded it is, and tells the core when that changes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson
import structlog

from backends.base import Post
from backends.chat import route_of
from backends.counters import counters_of
from backends.fetch import fetch
from backends.http import HttpError
from backends.pause import pause
from backends.sglang import BOOTSTRAP_PORT, Server, Sglang
from gateway.config import Telemetry
from policies.clock import Clock
from policies.events import Load, LoadReport, WorkerDown, WorkerUp
from policies.types import Role, Worker

log = structlog.get_logger("slackwater.worker")

_ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "null": Role.UNIFIED, None: Role.UNIFIED}
_LOADS = b"/v1/loads?include=core,disagg"


Meet = Callable[[Server, Mapping[str, Any]], Awaitable[frozenset[str]]]
"""What a server's engine does by itself."""


class Prober:
    """One loop a server: its facts when it appears, its load ever after."""

    def __init__(
        self,
        backend: Sglang,
        post: Post,
        clock: Clock,
        settings: Telemetry,
        meet: Meet,
    ) -> None:
        self._backend = backend
        self._post = post
        self._clock = clock
        self._meet = meet
        self._loops: dict[str, asyncio.Task[None]] = {}
        self.settings = settings

    def watch(self, server: Server, configured: Worker, group: asyncio.TaskGroup) -> asyncio.Event:
        """The event is set once the server has answered or failed for the first time."""
        looked = asyncio.Event()
        self.forget(server.name)
        self._loops[server.name] = group.create_task(self._loop(server, configured, looked))
        return looked

    def expect(self, worker: Worker) -> None:
        """Known before it has answered: requests are told "unavailable" rather than "no server"."""
        self._post(WorkerUp(worker))
        self._post(WorkerDown(worker.name))

    def forget(self, name: str) -> None:
        if (task := self._loops.pop(name, None)) is not None:
            task.cancel()

    def close(self) -> None:
        for name in list(self._loops):
            self.forget(name)

    async def _loop(self, server: Server, configured: Worker, looked: asyncio.Event) -> None:
        failures, down = 0, False
        while True:
            try:
                worker = None
                if not server.is_known:
                    worker = await self._introduced(server, configured)
                known_as, is_turning = server.worker, server.is_turning
                # Only whoever tells its load, or has no such page, is up.
                ranks = await self._ranks(server)
                load = load_of(ranks, round(self._clock.time() * 1e6)) if ranks else None
                if worker is not None:
                    was_up, server.is_known, server.is_doubted = server.is_doubted, True, False
                    self._post(WorkerUp(worker))
                    if not was_up:
                        log.info("worker up", worker=worker.name, role=worker.role.value)
                if load is not None:
                    self._post(LoadReport(server.name, load))
                failures, down = 0, False
                # Known better meanwhile, it may have said this before it switched.
                is_turning = is_turning or server.is_turning
                if ranks and server.worker is known_as and not is_turning:
                    await self._follow_role(server, configured, ranks[0])
            except Exception as error:  # noqa: BLE001  # whatever it says, it is asked again
                failures += 1
                if not down and failures >= self.settings.failures:
                    # Of a server watched anew the core may still think that it is up.
                    server.is_known, server.is_doubted, down = False, False, True
                    self._post(WorkerDown(server.name))
                    log.warning("worker down", worker=server.name, error=str(error))
                elif failures == 1:
                    log.warning("probe failed", worker=server.name, error=str(error))
            looked.set()
            await pause(self._clock, self.settings.poll_ms / 1000)

    async def _introduced(self, server: Server, configured: Worker) -> Worker | None:
        """None where only its plug-in is in doubt and it is too busy to say: its load decides."""
        try:
            return await self._introduce(server, configured)
        except (HttpError, ValueError):
            if server.is_doubted:
                return None
            raise

    async def _introduce(self, server: Server, configured: Worker) -> Worker:
        """The server's own word on its role and size; what the operator wrote goes first."""
        model, context_tokens = await self._model(server)
        facts = await self._facts(server)
        worker = learnt(configured, facts, model, context_tokens)
        worker = replace(worker, engine=await self._meet(server, facts))
        if "sampling_defaults" in facts:
            server.chat = route_of(facts, await self._fetch(server, b"/model_info") or {})
        if worker.role not in (configured.role, server.worker.role) and not server.is_turning:
            log.warning(
                "the server has another role than configured",
                worker=worker.name,
                configured=configured.role.value,
                actual=worker.role.value,
            )
        self._backend.update(worker)
        return worker

    async def _facts(self, server: Server) -> Mapping[str, Any]:
        """A server without these pages is taken as configured, one without a voice is down."""
        for path in (b"/server_info", b"/get_server_info"):
            answer = await self._fetch(server, path)
            if answer is not None:
                return answer
        return {}

    async def _model(self, server: Server) -> tuple[str, int]:
        """Its name, and how many tokens a request may have."""
        answer = await self._fetch(server, b"/v1/models")
        data = answer.get("data") if answer else None
        return (str(data[0]["id"]), _whole(data[0], "max_model_len")) if data else ("", 0)

    async def _ranks(self, server: Server) -> list[Mapping[str, Any]]:
        answer = await self._fetch(server, _LOADS)
        return answer.get("loads") or [] if answer is not None else []

    async def _follow_role(
        self, server: Server, configured: Worker, rank: Mapping[str, Any]
    ) -> None:
        """Somebody may switch a server's role; what it reports with its load is the role it has."""
        pairing = rank.get("disaggregation")
        mode = pairing.get("mode") if isinstance(pairing, dict) else None
        if not isinstance(mode, str) or _ROLES.get(mode, server.worker.role) is server.worker.role:
            return
        worker = replace(await self._introduce(server, configured), role=_ROLES[mode])
        self._backend.update(worker)
        self._post(WorkerUp(worker))
        log.info("worker has switched its role", worker=worker.name, role=worker.role.value)

    async def _fetch(self, server: Server, path: bytes) -> Mapping[str, Any] | None:
        answer = await fetch(
            server.upstream, b"GET", path, timeout_s=self.settings.timeout_ms / 1000
        )
        if answer.status != 200:
            return None
        parsed = orjson.loads(answer.body)
        if not isinstance(parsed, dict):
            raise ValueError(f"{path.decode()} did not answer an object")
        return parsed


def learnt(worker: Worker, info: Mapping[str, Any], model: str, context_tokens: int = 0) -> Worker:
    mode = info.get("disaggregation_mode", "unknown")
    dp_size = _whole(info, "dp_size") or 1
    return replace(
        worker,
        role=_ROLES.get(mode, worker.role),
        model=worker.model or model,
        bootstrap_port=worker.bootstrap_port
        or _whole(info, "disaggregation_bootstrap_port")
        or (BOOTSTRAP_PORT if _ROLES.get(mode, worker.role) is Role.PREFILL else None),
        dp_size=dp_size,
        page_size=_whole(info, "page_size") or 1,
        kv_tokens=worker.kv_tokens or _whole(info, "max_total_num_tokens") * dp_size,
        max_running=worker.max_running or _whole(info, "max_running_requests"),
        chunk_tokens=worker.chunk_tokens or max(0, _whole(info, "chunked_prefill_size")),
        # Who cuts prompts to what fits refuses none.
        context_tokens=0 if info.get("allow_auto_truncate") is True else context_tokens,
        orders_by_priority=info.get("enable_priority_scheduling") is True,
        streams_increments=_flag(info, "incremental_streaming_output"),
    )


def load_of(ranks: list[Mapping[str, Any]], now_us: int) -> Load:
    """The ranks of one server together."""
    return Load(
        seen_us=now_us,
        running=_sum(ranks, "num_running_reqs"),
        waiting=_sum(ranks, "num_waiting_reqs"),
        used_tokens=_sum(ranks, "num_used_tokens"),
        total_tokens=_sum(ranks, "num_total_tokens"),
        capacity_tokens=_sum(ranks, "max_total_num_tokens"),
        max_running=_sum(ranks, "max_running_requests"),
        waiting_uncached_tokens=_sum(ranks, "num_waiting_uncached_tokens"),
        counters=counters_of(ranks),
    )


def _sum(ranks: list[Mapping[str, Any]], key: str) -> int:
    return sum(_whole(rank, key) for rank in ranks)


def _flag(table: Mapping[str, Any], key: str) -> bool | None:
    value = table.get(key)
    return value if isinstance(value, bool) else None


def _whole(table: Mapping[str, Any], key: str) -> int:
    value = table.get(key)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0
