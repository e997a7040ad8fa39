"""What an actuator must be told, and find on this machine, before anything is asked of it.

One place for whoever starts, checks or reloads a configuration, so that all refuse the same.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from backends.actuators.nobody import NobodyTurn
from backends.actuators.turning import Turn
from backends.fleet import interpreter
from gateway.actuation import ELASTIC, Actuation, Settings, Surroundings, turn_of
from gateway.settings import ConfigError


def is_used(settings: Settings) -> bool:
    """Those that name servers always are; the others where a policy may want a change, in
    `advise` too: a reload makes that `act`."""
    return settings.policy != "static" or settings.actuator in ELASTIC


def demand(settings: Settings, *, has_fleet: bool) -> None:
    """ConfigError where something is missing that would be used."""
    if is_used(settings):
        demand_all(settings, has_fleet=has_fleet)


def turn_for(settings: Settings, around: Surroundings) -> Turn:
    """What lacks something is nobody, where nothing is going to be asked of it."""
    has_fleet = around.fleet is not None
    demand(settings, has_fleet=has_fleet)
    try:
        demand_all(settings, has_fleet=has_fleet)
    except ConfigError as error:
        return NobodyTurn(str(error))
    return turn_of(settings, around)


def demand_all(settings: Settings, *, has_fleet: bool) -> None:
    """The same whether it would be used or not."""
    if settings.actuator is Actuation.RELAUNCH:
        _relaunch(settings, has_fleet=has_fleet)
    elif (check := _DEMANDS.get(settings.actuator)) is not None:
        check(settings)


def _relaunch(settings: Settings, *, has_fleet: bool) -> None:
    if not settings.relaunch.control and not has_fleet:
        raise ConfigError(
            'ratio.actuator "relaunch" needs a fleet: `slackwater serve --fleet FLEET.toml`, or '
            "ratio.relaunch.control and `slackwater fleet --control SOCKET`"
        )


def _webhook(settings: Settings) -> None:
    told = settings.webhook.url
    if not told:
        raise ConfigError("ratio.webhook.url is missing")
    try:
        url = urlsplit(told)
        address = (url.hostname, url.port)
    except ValueError as error:
        raise ConfigError(f"ratio.webhook.url: {error}") from None
    plain = told.isascii() and told.isprintable() and not {*" #@"} & {*told}
    if url.scheme not in ("http", "https") or not address[0] or not plain:
        raise ConfigError(f"ratio.webhook.url must be http://HOST:PORT/PATH, got {told!r}")


def _kubernetes(settings: Settings) -> None:
    told = settings.kubernetes
    if not told.prefill or not told.decode:
        raise ConfigError("ratio.kubernetes.prefill and ratio.kubernetes.decode are missing")
    if told.prefill == told.decode:
        raise ConfigError(
            f"ratio.kubernetes.prefill and ratio.kubernetes.decode are both {told.decode!r}: "
            "each role has a workload of its own"
        )
    _need("kubernetes_asyncio", "kubernetes")
    files = [Path(name).expanduser() for name in told.kubeconfig.split(os.pathsep)]
    if told.kubeconfig and not any(file.is_file() for file in files):
        raise ConfigError(f"ratio.kubernetes.kubeconfig: there is no file {told.kubeconfig}")


def _ray(settings: Settings) -> None:
    told = settings.ray
    try:
        words = shlex.split(told.command)
    except ValueError as error:
        raise ConfigError(f"ratio.ray.command: {in_lower(str(error))}") from None
    if not words:
        raise ConfigError("ratio.ray.command is missing")
    if interpreter.chosen(told.python) == sys.executable:  # another one says so itself
        _need("ray", "ray")


def in_lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _need(module: str, name: str) -> None:
    if find_spec(module) is None:
        raise ConfigError(
            f"ratio.actuator {name!r} needs {module}: pip install 'slackwater[{name}]'"
        )


_DEMANDS: dict[Actuation, Callable[[Settings], None]] = {
    Actuation.WEBHOOK: _webhook,
    Actuation.KUBERNETES: _kubernetes,
    Actuation.RAY: _ray,
}
