"""A gateway in front of real servers, in the test's own loop, and what its tests ask of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.app import Gateway
from gateway.clock import LiveClock
from gateway.config import (
    BreakerSettings,
    Config,
    Policies,
    Server,
    Telemetry,
    Timeouts,
    WorkerEntry,
)
from policies.types import Pool, Role
from tests.conformance.under_test import Client, Leg, is_idle

REAL = [pytest.mark.real_time, pytest.mark.timeout(60, func_only=True)]
"""Each module's marks; the fleet's start, which the first test pays for, has its own limit."""

OFFLINE = {"x-slackwater-class": "offline"}
SHARED = Policies(pools="none")
FREED_WITHIN_S = 2.0

QUICK = Config(
    server=Server(port=0, drain_s=20.0),
    policies=Policies(),
    timeouts=Timeouts(
        connect_s=1.0,
        first_token_online_s=20.0,
        first_token_offline_s=20.0,
        between_tokens_s=5.0,
        total_s=60.0,
    ),
    breaker=BreakerSettings(cooldown_ms=200.0, cooldown_max_ms=1000.0),
    telemetry=Telemetry(poll_ms=100.0, timeout_ms=2000.0),
)


@dataclass
class Site:
    """The gateway and its client, who can also speak to the servers behind it."""

    gateway: Gateway
    config: Config
    client: Client
    lines: list[dict[str, Any]]
    """The log's lines about requests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.port}"

    def entries(self, *names: str) -> tuple[WorkerEntry, ...]:
        return entries(self.client, *names)

    def generate(self, ids: list[int], tokens: int, **more: Any) -> Leg:
        return self.client.generate(self.url, ids, tokens, **more)

    async def generated(self, ids: list[int], tokens: int, **more: Any) -> Leg:
        return await over(self.generate(ids, tokens, **more))

    def chat(self, tokens: int, **more: Any) -> Leg:
        return self.client.chat(self.url, "Tell me of a river", tokens, **more)

    def send(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> Leg:
        return self.client.send(self.url + path, body, headers)

    async def ask(self, path: str, body: dict[str, Any]) -> Leg:
        return await over(self.send(path, body))

    async def alone(self, ids: list[int], tokens: int) -> list[int]:
        """What the unified server answers when it is asked directly."""
        return (await self.client.generated(self.client.fleet.unified, ids, tokens)).ids

    async def until(self, holds: Callable[[], object], within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while not holds():  # noqa: ASYNC110 - a state is looked at
                await asyncio.sleep(0.01)

    async def freed(self, within_s: float = FREED_WITHIN_S) -> None:
        """No server runs or holds anything any more, and the gateway knows of no request."""
        async with asyncio.timeout(within_s):
            for entry in self.config.worker:
                await self.client.until(entry.url, is_idle, within_s)
        assert self.leftovers() == []

    def leftovers(self) -> list[str]:
        gateway = self.gateway
        counts = {
            "requests in front": len(gateway.front),
            "jobs in the core": len(gateway.core),
            "attempts": len(gateway.backend),
        }
        left = [f"{count} {what}" for what, count in counts.items() if count]
        return left + [repr(e) for e in gateway.core.ledgers.values() if not e.is_empty]


async def over(leg: Leg) -> Leg:
    await leg.task
    return leg


def entries(client: Client, *names: str, **more: Any) -> tuple[WorkerEntry, ...]:
    """Of the fleet's servers, by their place in it; `more` holds settings of all of them."""
    fleet = client.fleet
    known = {
        "prefill": (fleet.prefill, Role.PREFILL, Pool.RELAXED),
        "decode": (fleet.decode, Role.DECODE, Pool.STRICT),
        "relaxed": (fleet.relaxed, Role.DECODE, Pool.RELAXED),
        "unified": (fleet.unified, Role.UNIFIED, Pool.RELAXED),
    }
    return tuple(
        WorkerEntry(
            url=url,
            name=name,
            role=role,
            pool=pool,
            bootstrap_port=0 if role is Role.UNIFIED else fleet.bootstrap_port(url),
            **more,
        )
        for name, (url, role, pool) in known.items()
        if name in names
    )


@asynccontextmanager
async def standing(
    client: Client, *names: str, worker: Mapping[str, Any] | None = None, **sections: Any
) -> AsyncIterator[Site]:
    """A gateway over these servers. Afterwards nothing is left of any request, nor complained of.

    `worker` holds more settings of all of them; `sections` replace those of QUICK.
    """
    names = names or ("prefill", "decode", "relaxed", "unified")
    config = replace(QUICK, worker=entries(client, *names, **(worker or {})), **sections)
    lines: list[dict[str, Any]] = []
    clock = LiveClock(asyncio.get_running_loop())
    # Its own ids and rooms: real servers still abort those of an earlier test for seconds after it.
    rng = random.Random(client.rng.getrandbits(128))
    with capture_logs() as told:
        async with asyncio.TaskGroup() as tasks:
            gateway = Gateway(config, clock, rng, tasks, lines.append)
            site = Site(gateway, config, client, lines)
            try:
                await gateway.start()
                await site.until(lambda: all(e.up for e in gateway.core.ledgers.values()), 20.0)
                yield site
                await site.until(lambda: not site.leftovers())
            finally:
                await gateway.close()
    assert [one for one in told if one["log_level"] == "error"] == []
