"""Which actuator changes servers, what its operator tells it, and how it is made."""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from backends.actuators.ray import Actors, RayTurn
from backends.actuators.relaunch import Relauncher, RelaunchTurn
from backends.actuators.sglang import SglangTurn
from backends.actuators.turning import Turn
from backends.actuators.webhook import Hook, WebhookTurn
from backends.base import Roll
from backends.fleet.control import FleetSocket
from backends.sglang import Sglang
from gateway.settings import ConfigError, bounded
from policies.clock import Clock
from policies.types import Pool


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaunch:
    control: str = ""
    """The socket of `slackwater fleet --control SOCKET`. Empty: the fleet of `serve --fleet`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    url: str = ""
    """Where the question is POSTed: docs/ratio.md has its schema."""
    secret: str = ""
    """Signs it: HMAC-SHA256 of the body in `x-slackwater-signature`. Empty: no signature."""
    answer_s: float = bounded(10.0, low=0.1)
    """For one answer; one that fails is asked for again."""
    poll_s: float = bounded(2.0, low=0.1)
    """A change that is pending is asked for again after this time."""
    within_s: float = bounded(600.0, low=1)
    """A change that is not over by then is cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubernetes:
    prefill: str = ""
    """The Deployment of the prefill servers, or the role of the group. Required."""
    decode: str = ""
    """The same of the decode servers. Required."""
    group: str = ""
    """The RoleBasedGroup that both are roles of. Empty: they are Deployments."""
    group_version: str = "v1alpha2"
    """Of the API `workloads.x-k8s.io`."""
    namespace: str = ""
    """Empty: the gateway's own."""
    kubeconfig: str = ""
    """Empty: the service account of the gateway's pod."""
    port: int = bounded(30000, low=1, high=65535)
    """Of a pod that has no port called `http`."""
    bootstrap_port: int = bounded(8998, low=1, high=65535)
    """Of a pod that has no port called `bootstrap`."""
    lease: str = "slackwater"
    """The Lease object whose holder is the one gateway that changes servers."""
    start_s: float = bounded(600.0, low=1)
    """A new pod that is not ready by then is given up, and the old one asked for again."""
    poll_s: float = bounded(2.0, low=0.1)
    """How often the pods are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ray:
    command: str = ""
    """What starts a server on a node, such as `python3 -m sglang.launch_server --model-path ...`;
    its address and its role come behind it. Required."""
    prefill: int = bounded(0, low=0)
    """Prefill servers at the beginning."""
    decode: int = bounded(0, low=0)
    """Decode servers at the beginning."""
    gpus: float = bounded(1.0, low=0)
    """Of one server: as many as its tensor parallelism."""
    cpus: float = bounded(1.0, low=0)
    """Of one server, in Ray's books."""
    pool: Pool = Pool.STRICT
    """Of all of them: `policies.pools`."""
    address: str = "auto"
    """The cluster; auto: the one that this machine is a node of."""
    namespace: str = "slackwater"
    """Only one gateway at a time changes the servers of a namespace; the others follow it."""
    python: str = ""
    """An interpreter with the cluster's versions of Ray and Python. Empty: the gateway's own."""
    outlive: bool = False
    """Whether servers go on without the gateway, to be found again by the next one."""
    start_s: float = bounded(600.0, low=1)
    """A server that is not ready by then is brought back to what it was."""
    poll_s: float = bounded(2.0, low=0.1)
    """How often the actors are asked how they are."""
    log: str = ""
    """What Ray itself has to say goes to this file. Empty: nowhere."""
    join_s: float = bounded(60.0, low=1)
    """The cluster must be joined within this time; else the gateway does not start."""


class Settings(Protocol):
    """What `[ratio]` says of actuators."""

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
    if around.fleet is None:
        raise ConfigError(
            'ratio.actuator "relaunch" needs a fleet: `slackwater serve --fleet FLEET.toml`, or '
            "ratio.relaunch.control and `slackwater fleet --control SOCKET`"
        )
    return RelaunchTurn(around.fleet)


def _webhook(settings: Settings, around: Surroundings) -> Turn:
    told = settings.webhook
    hook = Hook(
        url=told.url,
        secret=told.secret,
        answer_s=told.answer_s,
        poll_s=told.poll_s,
        within_s=told.within_s,
    )
    return WebhookTurn(hook, around.clock, around.rng, around.roll)


def _kubernetes(settings: Settings, around: Surroundings) -> Turn:
    told = settings.kubernetes
    if not told.prefill or not told.decode:
        raise ConfigError("ratio.kubernetes.prefill and ratio.kubernetes.decode are missing")
    module = extra("backends.actuators.kubernetes", "kubernetes")
    cluster = module.Cluster(**asdict(told))
    turn: Turn = module.KubernetesTurn(cluster, around.clock, around.rng, around.tasks, around.roll)
    return turn


def _ray(settings: Settings, around: Surroundings) -> Turn:
    told = settings.ray
    if not told.command.split():
        raise ConfigError("ratio.ray.command is missing")
    return RayTurn(Actors(**asdict(told)), around.clock, around.rng, around.tasks, around.roll)


_MAKERS: dict[Actuation, Callable[[Settings, Surroundings], Turn]] = {
    Actuation.SGLANG: _sglang,
    Actuation.RELAUNCH: _relaunch,
    Actuation.WEBHOOK: _webhook,
    Actuation.KUBERNETES: _kubernetes,
    Actuation.RAY: _ray,
}


def extra(module: str, name: str) -> Any:
    """What only some gateways need, and what is large, is imported where it is asked for."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ratio.actuator {name!r} needs {error.name}: pip install 'slackwater[{name}]'"
        ) from None
