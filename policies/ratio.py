"""What every ratio policy gets and returns: how many servers are to prefill, how many to decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from policies.demand import Demand, Fleet


class Why(StrEnum):
    """Why a plan is as it is; it reaches the log and the metrics."""

    FIXED = "fixed"
    HOLDS = "holds"
    MOVING = "moves_under_way"
    DWELL = "dwell"
    IDLE = "idle"
    UNKNOWN = "nothing_known"
    CHANGED = "fleet_changed"
    SHORT_OF_PREFILL = "short_of_prefill"
    SHORT_OF_DECODE = "short_of_decode"
    SHORT_OF_BOTH = "short_of_both"
    SPARE = "spare"
    RATIO = "ratio"
    TREND = "trend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The servers of each role that are wanted, never none."""

    prefills: int
    decodes: int
    why: Why
    terms: Mapping[str, float] = field(default_factory=dict)
    """What the decision was computed from, for whoever asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a policy keeps between two looks."""

    needed: tuple[tuple[int, int, int], ...] = ()
    """When, how many prefill and how many decode servers would have been enough with some room."""
    grew_us: tuple[int | None, int | None] = (None, None)
    """When more prefill servers were wanted, and when more decode servers."""
    seen: tuple[int, int] = (0, 0)
    """The fleet at the last look."""
    series: tuple[tuple[float, float], ...] = ()
    """Loads of the last looks, for trends."""
    grace: int = 0
    """Looks for which a new decode server is spared."""


class Ratio(Protocol):
    """Asked at every look; it returns what it wants to remember."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]: ...


def holds(fleet: Fleet, why: Why, terms: Mapping[str, float] | None = None) -> Plan:
    return Plan(
        prefills=max(1, fleet.prefills),
        decodes=max(1, fleet.decodes),
        why=why,
        terms=terms or {},
    )


@dataclass(frozen=True, slots=True)
class Static:
    """The fleet as it is."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        return memory, holds(fleet, Why.FIXED)
