"""What is told of a request in its `custom_params`, and how it has fared in this engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from backends.sglang_plugin.contract import Request

CLASS: Final = "slackwater_class"
TPOT: Final = "slackwater_tpot_ms"
LONGEST_TARGET_MS: Final = 3_600_000.0
_PLACE: Final = "slackwater_rider"
"""The attribute by which a request carries it."""


class Rider:
    """One request of this engine; nonsense in what is told of it counts as untold."""

    __slots__ = (
        *("always", "base", "first_us", "is_nonsense", "is_online"),
        *("parked_us", "skipped", "tpot_us"),
    )

    def __init__(self, request: Request, now_us: float) -> None:
        told = request.sampling_params.custom_params
        told = told if isinstance(told, dict) else {}
        self.is_nonsense = is_nonsense(told)
        self.is_online = told.get(CLASS) != "offline"
        self.tpot_us = target_us(told.get(TPOT))
        self.always = is_penalised(request.sampling_params)
        """SGLang counts its tokens step by step: it may sit none out."""
        self.first_us = now_us
        self.base = len(request.output_ids)
        self.skipped = 0
        self.parked_us = 0.0
        """Since when it waits for a step; 0: it takes part."""

    def park(self, now_us: float) -> None:
        self.parked_us = self.parked_us or now_us

    def ride(self) -> None:
        self.parked_us, self.skipped = 0.0, 0


def rider_of(request: Request, now_us: float) -> Rider:
    rider: Rider | None = getattr(request, _PLACE, None)
    if rider is None:
        rider = Rider(request, now_us)
        setattr(request, _PLACE, rider)
    return rider


def is_offline(request: Request) -> bool:
    told = request.sampling_params.custom_params
    return isinstance(told, dict) and told.get(CLASS) == "offline"


def target_us(told: object) -> float:
    """0 where nothing was told that could be one."""
    if isinstance(told, bool) or not isinstance(told, int | float):
        return 0.0
    return told * 1e3 if 0 < told <= LONGEST_TARGET_MS else 0.0


def is_nonsense(told: Mapping[str, Any]) -> bool:
    strange_class = told.get(CLASS, "online") not in ("online", "offline")
    return strange_class or (TPOT in told and not target_us(told[TPOT]))


def is_penalised(params: Any) -> bool:
    return bool(
        params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )
