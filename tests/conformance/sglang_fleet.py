"""Real SGLang as a fleet under test: it runs on a loop of its own, in a thread, for the session."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backends.fleet.fleet import Fleet
from backends.fleet.plan import Server
from backends.fleet.spec import FleetSpec, Group
from policies.types import Pool, Role
from tests.conformance.under_test import (
    CHUNK_TOKENS,
    HEARTBEAT_S,
    KV_TOKENS,
    MISSED_HEARTBEATS,
    RELAXED_RUNNING,
    RENDEZVOUS_TIMEOUT_S,
    UNIFIED_QUEUED,
    UNIFIED_RUNNING,
)

LEFT_OUT = (
    "left out: conformance and end-to-end tests on real SGLang, which is not installed "
    "(see docs/sglang.md)"
)


def is_included() -> bool:
    """Whether there is an SGLang, or its absence is to be a failure."""
    named = os.environ.get("SLACKWATER_SGLANG_PYTHON")
    required = os.environ.get("SLACKWATER_REQUIRE_SGLANG") == "1"
    return required or bool(named) or importlib.util.find_spec("sglang") is not None


def spec(logs: Path) -> FleetSpec:
    return FleetSpec(
        model="tiny",
        logs=str(logs),
        kv_tokens=KV_TOKENS,
        env={
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(RENDEZVOUS_TIMEOUT_S),
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(RENDEZVOUS_TIMEOUT_S),
            "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": str(HEARTBEAT_S),
            "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": str(MISSED_HEARTBEATS),
            "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": str(HEARTBEAT_S),
        },
        flags=("--enable-priority-scheduling",),
        servers=(
            Group(role=Role.PREFILL, flags=("--chunked-prefill-size", str(CHUNK_TOKENS))),
            Group(role=Role.DECODE, pool=Pool.STRICT),
            Group(
                role=Role.DECODE,
                flags=(
                    *("--max-running-requests", str(RELAXED_RUNNING)),
                    "--incremental-streaming-output",
                ),
            ),
            Group(
                role=Role.UNIFIED,
                flags=(
                    *("--max-running-requests", str(UNIFIED_RUNNING)),
                    *("--max-queued-requests", str(UNIFIED_QUEUED)),
                ),
            ),
        ),
    )


class RealServers:
    """As one fleet asks for them."""

    def __init__(self, asked: FleetSpec) -> None:
        self._asked = asked
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-fleet")

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._fleet = self._do(self._opened()).result()
        except BaseException:
            self._end()
            raise
        self.servers: tuple[Server, ...] = self._fleet.servers
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._do(self._fleet.__aexit__(None, None, None)).result()
        self._end()

    async def _opened(self) -> Fleet:
        return await Fleet(self._asked).__aenter__()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _server(self, url: str) -> Server:
        return next(server for server in self.servers if server.url == url)

    def bootstrap_port(self, url: str) -> int:
        port = self._server(url).bootstrap_port
        assert port is not None
        return port

    async def kill(self, url: str) -> None:
        await asyncio.wrap_future(self._do(self._fleet.kill(self._server(url).name)))

    async def start(self, url: str) -> None:
        await asyncio.wrap_future(self._do(self._fleet.start(self._server(url).name)))


class SGLangFleet:
    """The one of the conformance suite."""

    def __init__(self, logs: Path) -> None:
        self._real = RealServers(spec(logs))
        self.bootstrap_port = self._real.bootstrap_port
        self.kill, self.start = self._real.kill, self._real.start

    def __enter__(self) -> Self:
        self._real.__enter__()
        self.prefill, self.decode, self.relaxed, self.unified = (
            server.url for server in self._real.servers
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._real.__exit__(kind, error, traceback)
