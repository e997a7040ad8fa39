"""Whether the actuator that a configuration names could do anything: asked before it has to."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from backends.actuators.turning import UnfitError
from backends.http import Upstream
from backends.sglang import Patience, Sglang
from gateway.actuation import ELASTIC, Surroundings
from gateway.actuator_demands import is_used, turn_for
from gateway.config import Config, workers_of
from gateway.settings import ConfigError
from gateway.suitability import Finding, Level
from policies.clock import Clock
from policies.types import Worker

_SUBJECT = "ratio.actuator"


@dataclass(slots=True)
class _NoRoll:
    """Nobody comes on a list that nobody keeps."""

    came: list[Worker] = field(default_factory=list)

    def come(self, worker: Worker, api_key: str = "") -> None:
        self.came.append(worker)

    def leave(self, name: str) -> None: ...


def finds_servers(config: Config) -> bool:
    """Whether servers may come that the configuration does not name."""
    return config.ratio.actuator in ELASTIC


async def actuator_findings(config: Config, clock: Clock, rng: random.Random) -> list[Finding]:
    """Requests are served all the same: what is in its way is a warning.

    ConfigError where the gateway would not start, with the same words.
    """
    if not is_used(config.ratio):
        return []
    problems = await _problems(config, clock, rng)
    return [Finding(level=Level.WARNING, subject=_SUBJECT, text=text) for text in problems]


async def _problems(config: Config, clock: Clock, rng: random.Random) -> list[str]:
    backend = Sglang(clock, rng, Patience(), _nobody)
    async with asyncio.TaskGroup() as tasks:
        around = Surroundings(backend=backend, clock=clock, rng=rng, tasks=tasks, roll=_NoRoll())
        try:
            return await turn_for(config.ratio, around).problems(workers_of(config))
        except (ConfigError, UnfitError) as error:
            refused = ConfigError(str(error))
    raise refused  # not in the group, which would wrap it


def _nobody(worker: Worker, api_key: str) -> Upstream:
    raise RuntimeError("a check connects to no server through its actuator")
