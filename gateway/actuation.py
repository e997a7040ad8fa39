"""Which actuator changes servers, what its operator tells it, and how it is made."""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from backends.actuators.ray import RayTurn
from backends.actuators.relaunch import Relauncher, RelaunchTurn
from backends.actuators.settings import Kubernetes, Ray, Relaunch, Webhook
from backends.actuators.sglang import SglangTurn
from backends.actuators.turning import Turn
from backends.actuators.webhook import WebhookTurn
from backends.base import Roll
from backends.fleet.control import FleetSocket
from backends.sglang import Sglang
from policies.clock import Clock


class Actuation(StrEnum):
    SGLANG = "sglang"
    """`POST /pd_role_switch`: the process goes on."""
    RELAUNCH = "relaunch"
    """A local fleet ends the process and starts it in the other role."""
    WEBHOOK = "webhook"
    """A service of the operator's does it."""
    KUBERNETES = "kubernetes"
    """One Deployment is made smaller and another one larger."""
    RAY = "ray"
    """Servers are Ray actors, which start their process in the other role."""


ACTUATOR_KEYS = ("actuator", "relaunch", "webhook", "kubernetes", "ray")
"""What cannot change while the gateway runs."""
ELASTIC = frozenset({Actuation.KUBERNETES, Actuation.RAY})
"""They start servers and end them, too."""
TYPICAL_S = {Actuation.SGLANG: 5.0}
"""What a switch takes until one was measured; what starts a process anew takes LAUNCH_S."""
LAUNCH_S = 45.0


class Settings(Protocol):
    """What `[ratio]` says of actuators."""

    @property
    def policy(self) -> str: ...
    @property
    def actuator(self) -> Actuation: ...
    @property
    def switch_s(self) -> float: ...
    @property
    def decode_cuda_graph_memory_gb(self) -> float: ...
    @property
    def relaunch(self) -> Relaunch: ...
    @property
    def webhook(self) -> Webhook: ...
    @property
    def kubernetes(self) -> Kubernetes: ...
    @property
    def ray(self) -> Ray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What an actuator may need of the gateway that it works for."""

    backend: Sglang
    clock: Clock
    rng: random.Random
    tasks: asyncio.TaskGroup
    roll: Roll
    fleet: Relauncher | None = None
    """That of `serve --fleet`."""


def turn_of(settings: Settings, around: Surroundings) -> Turn:
    """Of settings that were looked at before: gateway/actuator_demands.py."""
    return _MAKERS[settings.actuator](settings, around)


def _sglang(settings: Settings, around: Surroundings) -> Turn:
    return SglangTurn(
        around.clock,
        switch_s=settings.switch_s,
        graph_memory_gb=settings.decode_cuda_graph_memory_gb,
    )


def _relaunch(settings: Settings, around: Surroundings) -> Turn:
    if settings.relaunch.control:
        return RelaunchTurn(FleetSocket(Path(settings.relaunch.control)))
    assert around.fleet is not None
    return RelaunchTurn(around.fleet)


def _webhook(settings: Settings, around: Surroundings) -> Turn:
    return WebhookTurn(settings.webhook, around.clock, around.rng, around.roll)


def _kubernetes(settings: Settings, around: Surroundings) -> Turn:
    """What only some gateways need, and what is large, is imported where it is asked for."""
    module = importlib.import_module("backends.actuators.kubernetes")
    told = settings.kubernetes
    turn: Turn = module.KubernetesTurn(told, around.clock, around.rng, around.tasks, around.roll)
    return turn


def _ray(settings: Settings, around: Surroundings) -> Turn:
    return RayTurn(settings.ray, around.clock, around.rng, around.tasks, around.roll)


_MAKERS: dict[Actuation, Callable[[Settings, Surroundings], Turn]] = {
    Actuation.SGLANG: _sglang,
    Actuation.RELAUNCH: _relaunch,
    Actuation.WEBHOOK: _webhook,
    Actuation.KUBERNETES: _kubernetes,
    Actuation.RAY: _ray,
}
