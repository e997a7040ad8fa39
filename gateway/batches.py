"""Whether there is a Batch API: what it needs is imported only where it is wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import import_module
from random import Random
from typing import Protocol

from gateway.batch.attempts import Attempts
from gateway.batch.files import Blobs
from gateway.batch.gauges import BatchGauges
from gateway.batch.lines import bodies
from gateway.batch.objects import Row
from gateway.batch.pace import PaceRule
from gateway.batch.runner import Rows, Runner, RunnerRule
from gateway.batch.settings import BatchSettings
from gateway.clock import unix_us
from gateway.front import Front
from gateway.metrics import Metrics
from gateway.passing import Passing
from gateway.router import Route
from gateway.settings import ConfigError
from policies.clock import Clock


class Batches(Protocol):
    def routes(self) -> list[Route]: ...

    async def start(self, tasks: asyncio.TaskGroup) -> None: ...

    def drain(self, within_s: float) -> None:
        """No more rows; those under way are given back once the time is over."""

    def hurry(self) -> None:
        """A second signal: they are given back now, and `close` takes a second at most."""

    async def close(self) -> None: ...


def batches(
    settings: BatchSettings,
    front: Front,
    passing: Passing,
    runs: Callable[[str], bool],
    metrics: Metrics,
    clock: Clock,
    rng: Random,
    now_us: Callable[[], int] = unix_us,
) -> Batches | None:
    """`runs`: whether a job is at a server now."""
    if not settings.is_on:
        return None
    try:
        service = import_module("gateway.batch.service")
    except ModuleNotFoundError as error:
        message = f"[batch] needs {error.name}: pip install 'slackwater[batch]'"
        raise ConfigError(message) from None
    own = Random(rng.getrandbits(128))
    rule = RunnerRule(
        checkpoint_s=settings.checkpoint_s, pace=PaceRule(most_held=settings.rows_held)
    )

    def make_runner(store: Rows, blobs: Blobs) -> Runner:
        async def read(rows: Sequence[Row]) -> list[bytes]:
            return await bodies(blobs, rows)

        attempts = Attempts(front, passing)
        runner = Runner(store, read, attempts, runs, clock, now_us, own, rule)
        metrics.registry.register(BatchGauges(runner, now_us))
        return runner

    made: Batches = service.Service(settings, front, clock, own, now_us, make_runner)
    return made
