"""What SGLang calls when it loads the plug-in: which features go on, and what they hook."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from backends.sglang_plugin.clock import now_us
from backends.sglang_plugin.plugin import Options, Plugin
from backends.sglang_plugin.targets import CONTROL, HOLD, NEEDS, SCHEDULER, Feature, why_not

log = logging.getLogger("sglang.slackwater")

NAME: Final = "slackwater"
PLUGINS: Final = "SGLANG_PLUGINS"
FEATURES: Final = "SLACKWATER_PLUGIN"
"""Names of features, with commas between; unset: all of them; empty: none."""
UNTESTED: Final = "SLACKWATER_PLUGIN_UNTESTED"
DRILL: Final = "SLACKWATER_PLUGIN_DRILL"
REPORTS: Final = "SLACKWATER_PLUGIN_REPORTS"
HOOKS: Final[Mapping[Feature, tuple[str, ...]]] = {
    Feature.DECODE: (
        SCHEDULER + "update_running_batch",
        SCHEDULER + "get_next_disagg_decode_batch_to_run",
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode",
    ),
    Feature.PREFILL: (
        SCHEDULER + "get_new_batch_prefill",
        SCHEDULER + "abort_request",
        SCHEDULER + "pause_generation",
        SCHEDULER + "is_fully_idle",
    ),
    Feature.REPORTS: (SCHEDULER + "process_batch_result",),
}
ENGINE_MODULE: Final = "sglang.srt.managers.scheduler"


def register() -> None:
    """In a process without a scheduler there is nothing to do, and nothing is imported for it.

    SGLang loads every plug-in there is where it is told of none: this one waits to be named.
    """
    if not is_named(os.environ) or ENGINE_MODULE not in sys.modules:
        return
    options = options_of(os.environ)
    if not is_wanted(options):
        return
    version = str(importlib.import_module("sglang.version").__version__)
    if why := why_not(CONTROL, version, untested=True):
        log.error("slackwater: the plug-in is off: %s", why)
        return
    refused = refusals(options, version)
    registry: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    plugin = Plugin(options, refused, now_us)
    for target in [*targets_of(refused), *drilled(options, version)]:
        hook = getattr(plugin, target.rpartition(".")[2])
        registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
    on = ", ".join(feature for feature in Feature if feature not in refused) or "none"
    log.info("slackwater: features on SGLang %s: %s", version, on)


def is_named(environ: Mapping[str, str]) -> bool:
    return NAME in [name.strip() for name in environ.get(PLUGINS, "").split(",")]


def is_wanted(options: Options) -> bool:
    """One that was asked for nothing but what is not there stays, to say so."""
    return bool(options.features or options.unknown)


def options_of(environ: Mapping[str, str]) -> Options:
    named = environ.get(FEATURES)
    names = [*Feature] if named is None else [one.strip() for one in named.split(",")]
    known = frozenset(Feature(name) for name in names if name in {*Feature})
    unknown = tuple(name for name in names if name and name not in {*Feature})
    if unknown:
        there = ", ".join(Feature)
        log.error("slackwater: %s: no such feature: %s (%s)", FEATURES, ", ".join(unknown), there)
    return Options(
        features=known,
        unknown=unknown,
        untested=environ.get(UNTESTED) == "1",
        drill=environ.get(DRILL) == "1",
        reports=environ.get(REPORTS, ""),
    )


def refusals(options: Options, version: str) -> dict[Feature, str]:
    """Every feature that stays off, and why."""
    found: dict[Feature, str] = {}
    for feature, need in NEEDS.items():
        if feature not in options.features:
            found[feature] = f"{FEATURES} does not name it"
        elif why := why_not(need, version, untested=options.untested):
            found[feature] = why
    return found


def targets_of(refused: Mapping[Feature, str]) -> list[str]:
    on = [
        target for feature, targets in HOOKS.items() if feature not in refused for target in targets
    ]
    return [*on, *CONTROL.parameters]


def drilled(options: Options, version: str) -> list[str]:
    """What only a drill hooks."""
    is_held = options.drill and not why_not(HOLD, version, untested=True)
    return [*HOLD.parameters] if is_held else []
