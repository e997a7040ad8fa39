"""What is told of the ratio controller after a run: who was switched when, and what did nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gateway.config import RatioSettings
from policies.events import Outcome, SwitchOver

MOST_TOLD = 12
"""Of one run; the JSON has all of them."""
IDLE_KEYS = (
    "actuator",
    "budget_gpus",
    "lease_s",
    "decode_cuda_graph_memory_gb",
    "relaunch",
    "webhook",
    "kubernetes",
    "ray",
)
"""Of `ratio`: a simulation switches its servers itself, nobody else does, and `parked` servers
say how large the fleet may become."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A server that took another role, or was given back, or did not."""

    began_s: float
    worker: str
    role: str
    """What it was to become; empty: it was to be given back."""
    outcome: str
    took_s: float

    @classmethod
    def of(cls, over: SwitchOver, now_us: int) -> Moved:
        return cls(
            began_s=(now_us - over.took_us) / 1e6,
            worker=over.worker,
            role="" if over.role is None else over.role.value,
            outcome=over.outcome.value,
            took_s=over.took_us / 1e6,
        )

    def __str__(self) -> str:
        what = f"{self.worker} becomes {self.role}" if self.role else f"{self.worker} is given back"
        told = "" if self.outcome == Outcome.DONE.value else f" ({self.outcome})"
        return f"{self.began_s:.0f} s {what} in {self.took_s:.1f} s{told}"


def move_note(where: str, moves: Iterable[Moved]) -> Iterator[str]:
    """One line a run; none where nothing moved."""
    told = [str(it) for it in moves]
    more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    if told:
        yield f"switches of {where}: " + "; ".join(told[:MOST_TOLD]) + more


def idle_note(policy: str, ratio: RatioSettings) -> Iterator[str]:
    default = RatioSettings()
    keys = [f"ratio.{key}" for key in IDLE_KEYS if getattr(ratio, key) != getattr(default, key)]
    if keys:
        yield f"settings of {policy} that do nothing in a simulation: {', '.join(keys)}"
