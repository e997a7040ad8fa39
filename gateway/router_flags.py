"""What the flags of SGLang's router mean here: its policies' names, and those that do nothing."""

from __future__ import annotations

import argparse

from gateway.settings import ConfigError
from policies.registry import PLACE

LIKE = {"random": "power-of-two"}
"""Policies of the router that have no namesake here, and what takes their place."""
LEVELS = {"warn": "warning"}

IDLE = {
    "--prefill-policy": "placement is one for both: --policy",
    "--decode-policy": "placement is one for both: --policy",
    "--cache-threshold": "cache-aware has no thresholds here",
    "--balance-abs-threshold": "cache-aware has no thresholds here",
    "--balance-rel-threshold": "cache-aware has no thresholds here",
    "--eviction-interval-secs": "there is no tree of prompts",
    "--max-tree-size": "there is no tree of prompts",
    "--worker-startup-timeout-secs": "servers join when they answer",
    "--worker-startup-check-interval": "servers are asked every telemetry.poll_ms",
    "--health-check-interval-secs": "servers are asked every telemetry.poll_ms",
    "--prometheus-host": "/metrics is on the gateway's own port",
    "--prometheus-port": "/metrics is on the gateway's own port",
    "--log-dir": "the log goes to standard error",
}
"""Accepted, so that a router's command line starts; the log says that they do nothing."""


def add_idle(parser: argparse.ArgumentParser) -> None:
    for flag, why in IDLE.items():
        parser.add_argument(flag, metavar="X", help=f"accepted, does nothing: {why}")


def idle_flags(given: argparse.Namespace) -> list[str]:
    """Those that were given."""
    named = ((flag, flag.strip("-").replace("-", "_")) for flag in IDLE)
    return [flag for flag, attribute in named if getattr(given, attribute) is not None]


def place_named(given: str) -> str:
    """A policy of ours, written as the router writes or as we do."""
    name = given.replace("_", "-")
    name = LIKE.get(name, name)
    if name not in PLACE:
        routers = sorted(name.replace("-", "_") for name in PLACE if "-" in name)
        known = ", ".join([*sorted(PLACE), *routers, *LIKE])
        raise ConfigError(f"--policy: {given!r} is not known, expected one of {known}")
    return name


def is_stand_in(given: str) -> bool:
    """Whether another policy takes the place of the one that was named."""
    return given in LIKE
