"""Whether there is a Batch API: what it needs is imported only where it is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib import import_module
from random import Random
from typing import Protocol

from gateway.batch.settings import BatchSettings
from gateway.clock import unix_us
from gateway.front import Front
from gateway.router import Route
from gateway.settings import ConfigError
from policies.clock import Clock


class Batches(Protocol):
    def routes(self) -> list[Route]: ...

    async def start(self, tasks: asyncio.TaskGroup) -> None: ...

    def drain(self, within_s: float) -> None:
        """No more rows; those under way are given back once the time is over."""

    async def close(self) -> None: ...


def batches(
    settings: BatchSettings,
    front: Front,
    clock: Clock,
    rng: Random,
    now_us: Callable[[], int] = unix_us,
) -> Batches | None:
    if not settings.is_on:
        return None
    try:
        service = import_module("gateway.batch.service")
    except ModuleNotFoundError as error:
        message = f"[batch] needs {error.name}: pip install 'slackwater[batch]'"
        raise ConfigError(message) from None
    own = Random(rng.getrandbits(128))
    made: Batches = service.Service(settings, front, clock, own, now_us)
    return made
