"""What a gateway may set at run time by /set_internal_state, which takes numbers and nothing else.

Whatever it sets is lent: without a renewal the engine goes back to what stock SGLang does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any, Final

from policies.step_line import StepLine
from policies.stepping import Valves

PREFIX: Final = "slackwater_"
MODES: Final = {0: "all", 1: "online-first", 2: "slack"}
DRILL: Final = {90: "random", 91: "faulty"}
"""For the equality suite alone; they need SLACKWATER_PLUGIN_DRILL=1."""
HELD: Final = ("held_base_us", "held_request_us", "held_token_us")
"""They need it, too."""
STEPS_ALL: Final = "all"


class Refused(ValueError):
    """What was to be set makes no sense; the text says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The state at rest is that of stock SGLang."""

    mode: str = STEPS_ALL
    tpot_us: float = 0.0
    """The target of online requests that name none."""
    displace: bool = False
    """Whether an online prompt goes before an offline one that is in its chunks."""
    valves: Valves = field(default_factory=Valves)
    line: StepLine | None = None
    """What the gateway's cost model says of a step; the engine's own fit where it is silent."""
    until_us: float = inf
    share: float = 0.5
    """Of the requests that step in the drill."""
    held: StepLine | None = None
    """What a decode step lasts at least, in the drill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The numbers of one call; None: as before."""

    mode: float | None = None
    tpot_us: float | None = None
    displace: float | None = None
    most_parked_us: float | None = None
    hold_steps: float | None = None
    base_us: float | None = None
    request_us: float | None = None
    token_us: float | None = None
    lease_s: float | None = None
    """0: for good."""
    share: float | None = None
    held_base_us: float | None = None
    held_request_us: float | None = None
    held_token_us: float | None = None
    reset: float | None = None
    """Features that faults have shut off are tried again."""


KEYS: Final = tuple(PREFIX + one.name for one in fields(Setting))
_BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "tpot_us": (0, 3.6e9),
    "displace": (0, 1),
    "most_parked_us": (1_000, 3.6e9),
    "hold_steps": (1, 64),
    "base_us": (0, 1e8),
    "request_us": (0, 1e8),
    "token_us": (0, 1e6),
    "lease_s": (0, 86_400),
    "share": (0, 1),
    "held_base_us": (0, 1e7),
    "held_request_us": (0, 1e6),
    "held_token_us": (0, 1e4),
    "reset": (0, 1),
}


def is_ours(key: str) -> bool:
    return key.startswith(PREFIX)


def setting_of(told: Mapping[str, Any], *, drill: bool) -> Setting:
    values: dict[str, float] = {}
    for key, value in told.items():
        if key not in KEYS:
            raise Refused(f"unknown key {key}, expected one of {list(KEYS)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise Refused(f"{key} must be a number, got {value!r}")
        name = key.removeprefix(PREFIX)
        low, high = _BOUNDS.get(name, (-inf, inf))
        if not low <= value <= high:
            raise Refused(f"{key} must be between {low:g} and {high:g}, got {value:g}")
        values[name] = float(value)
    modes = MODES | DRILL if drill else MODES
    if "mode" in values and values["mode"] not in modes:
        raise Refused(f"{PREFIX}mode must be one of {modes}, got {values['mode']:g}")
    if not drill and any(name in values for name in HELD):
        raise Refused(f"{PREFIX}held_* is for drills")
    return Setting(**values)


def adjusted(control: Control, setting: Setting, now_us: float) -> Control:
    """The control after one call."""
    valves, line = control.valves, control.line
    if setting.most_parked_us is not None:
        valves = replace(valves, most_parked_us=setting.most_parked_us)
    if setting.hold_steps is not None:
        valves = replace(valves, hold_steps=int(setting.hold_steps))
    line = _line_of(line, setting.base_us, setting.request_us, setting.token_us)
    held = (setting.held_base_us, setting.held_request_us, setting.held_token_us)
    until_us = control.until_us
    if setting.lease_s is not None:
        until_us = now_us + setting.lease_s * 1e6 if setting.lease_s else inf
    return replace(
        control,
        mode=control.mode if setting.mode is None else (MODES | DRILL)[int(setting.mode)],
        tpot_us=control.tpot_us if setting.tpot_us is None else setting.tpot_us,
        displace=control.displace if setting.displace is None else setting.displace > 0,
        share=control.share if setting.share is None else setting.share,
        valves=valves,
        line=line,
        held=_line_of(control.held, *held),
        until_us=until_us,
    )


def _line_of(before: StepLine | None, *terms: float | None) -> StepLine | None:
    """As before where none of them is told; none where all that are told are 0."""
    if all(term is None for term in terms):
        return before
    return StepLine(*(term or 0.0 for term in terms)) if any(terms) else None
