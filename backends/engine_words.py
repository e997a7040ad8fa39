"""How the gateway speaks to the plug-in in an engine: what it asks, reads and pushes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from backends.sglang_plugin.control import MODES, PREFIX
from backends.sglang_plugin.plugin import STATE
from backends.sglang_plugin.reports import FIELDS, TOPIC
from backends.sglang_plugin.riders import CLASS, TPOT
from backends.sglang_plugin.targets import Feature
from policies.step_line import SeenStep, StepLine
from policies.types import Job, Kind

__all__ = [
    "MODES",
    "NO_FEATURE",
    "NO_LINE",
    "TOPIC",
    "Feature",
    "Heard",
    "setting",
    "states_of",
    "steps_of",
    "told",
    "told_line",
]

NO_LINE: Final = {"base_us": 0.0, "request_us": 0.0, "token_us": 0.0}
"""The engine takes back what it was told of its steps, and goes by its own."""

NO_FEATURE: Final = f"no such feature: there are {', '.join(Feature)}"
MOST_NAME: Final = 40
"""Of a name that a server says; it goes into the log."""

COUNTS: Final = ("views", "parked", "displaced", "aside")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What the plug-ins of one server's ranks say of themselves."""

    features: frozenset[str]
    """On in all of them."""
    why_off: Mapping[str, str]
    """Names that were given there as features and are none, too."""
    mode: str
    knows_steps: bool
    """All of them go by steps of their own; what a gateway has told them it may take back."""
    faults: int
    reports: tuple[str, ...]
    """Where each of them publishes its steps."""
    views: int = 0
    parked: int = 0
    displaced: int = 0
    aside: int = 0
    """Of all ranks together."""


def states_of(info: object) -> Heard | None:
    """None where no plug-in is loaded, or not in all ranks; whatever else it is, is none either."""
    ranks = info.get("internal_states") if isinstance(info, dict) else None
    ranks = ranks if isinstance(ranks, list) else []
    found = [rank.get(STATE) for rank in ranks if isinstance(rank, dict)]
    states = [state for state in found if isinstance(state, dict)]
    if not states or len(states) < len(found):
        return None
    whys = {
        feature.value: next(filter(None, (_why_off(state, feature) for state in states)), "")
        for feature in Feature
    }
    whys |= {name: NO_FEATURE for state in states for name in _unknown(state)}
    return Heard(
        features=frozenset(name for name, why in whys.items() if not why),
        why_off={name: why for name, why in whys.items() if why},
        mode=str(states[0].get("mode", "all"))[:MOST_NAME],
        knows_steps=all(state.get("line_from") == "steps" for state in states),
        faults=sum(_faults(state) for state in states),
        reports=tuple(str(state["reports"]) for state in states if state.get("reports")),
        **{name: sum(_count(state, name) for state in states) for name in COUNTS},
    )


def _why_off(state: Mapping[str, Any], feature: Feature) -> str:
    told = _features(state).get(feature.value)
    if not isinstance(told, dict):
        return "it is not known there"
    return "" if told.get("on") is True else str(told.get("why_off") or "it is off")


def _count(state: Mapping[str, Any], name: str) -> int:
    told = state.get(name)
    return told if type(told) is int and told >= 0 else 0


def _unknown(state: Mapping[str, Any]) -> list[str]:
    told = state.get("unknown")
    return [str(name)[:MOST_NAME] for name in told] if isinstance(told, list) else []


def _faults(state: Mapping[str, Any]) -> int:
    features = [told for told in _features(state).values() if isinstance(told, dict)]
    return sum(told["faults"] for told in features if type(told.get("faults")) is int)


def _features(state: Mapping[str, Any]) -> Mapping[str, Any]:
    told = state.get("features")
    return told if isinstance(told, dict) else {}


def setting(**values: float) -> bytes:
    """The body of /set_internal_state."""
    return orjson.dumps({"server_args": {PREFIX + name: value for name, value in values.items()}})


def told_line(line: StepLine) -> dict[str, float]:
    """The settings that say how long steps are."""
    return {name: float(value) for name, value in line._asdict().items()}


def told(job: Job, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that say its class and target; its own custom_params stay."""
    words: dict[str, Any] = {CLASS: job.kind.value}
    if job.kind is Kind.ONLINE and job.tpot_us:
        words[TPOT] = job.tpot_us / 1e3
    if "messages" in body or "prompt" in body:
        return {"custom_params": _with(body.get("custom_params"), words)}
    sampling = body.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        return {}
    params = _with(sampling.get("custom_params"), words)
    return {"sampling_params": {**sampling, "custom_params": params}}


def _with(own: object, words: Mapping[str, Any]) -> dict[str, Any]:
    return {**(own if isinstance(own, dict) else {}), **words}


def steps_of(body: bytes) -> Iterator[SeenStep]:
    """The decode steps of one report; what makes no sense in it is left out."""
    try:
        rows = orjson.loads(body)["steps"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return
    for row in rows if isinstance(rows, list) else ():
        if _is_step(row) and row[_AT["decode"]]:
            count, context, took_us = (row[_AT[name]] for name in _DECODED)
            yield SeenStep(count, context, float(took_us))


_DECODED: Final = ("count", "context_tokens", "took_us")
_AT: Final = {name: place for place, name in enumerate(FIELDS)}


def _is_step(row: Sequence[object]) -> bool:
    return (
        isinstance(row, list)
        and len(row) == len(FIELDS)
        and all(type(value) is int and value >= 0 for value in row)
    )
