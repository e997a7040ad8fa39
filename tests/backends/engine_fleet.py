"""A fleet of engines on a virtual clock, and a listener that writes everything down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.engine import Engine, EngineConfig, Fabric, Request, Resident, ids_prompt
from policies.clock import VirtualClock
from policies.types import Role

STEP_S = 0.01
TOKEN_S = 1e-4


@dataclass(frozen=True, slots=True)
class RoundSteps:
    """Times that a reader can add up: 10 ms a decode step, 0.1 ms a prompt token."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return TOKEN_S * sum(new for new, _ in chunks)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return STEP_S


@dataclass
class Heard:
    """One request's story."""

    clock: VirtualClock
    tokens_at: list[float] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)
    losses: int = 0
    ended_at: float = -1.0
    output: list[int] = field(default_factory=list)

    def tokens(self, resident: Resident) -> None:
        self.tokens_at.append(self.clock.time())

    def finished(self, resident: Resident, reason: dict[str, Any]) -> None:
        self.ends.append(reason)
        self.ended_at = self.clock.time()
        self.output = resident.output_ids

    def lost(self, resident: Resident) -> None:
        self.losses += 1

    @property
    def reason(self) -> dict[str, Any]:
        assert len(self.ends) == 1
        return self.ends[0]


class Servers:
    """Engines by name; `pair` submits both legs of a request."""

    def __init__(self, make: Callable[..., Engine] = Engine, /, **configs: dict[str, Any]) -> None:
        self.clock = VirtualClock()
        fabric = Fabric(self.clock)
        self.engines = {
            name: make(
                EngineConfig(**{"name": name, "bootstrap_port": port, **config}),
                self.clock,
                RoundSteps(),
                fabric,
            )
            for port, (name, config) in enumerate(configs.items(), 1)
        }

    def __getitem__(self, name: str) -> Engine:
        return self.engines[name]

    @staticmethod
    def request(rid: str, **request: Any) -> Request:
        return Request(rid=rid, **request)

    def submit(self, name: str, rid: str = "r", **request: Any) -> Heard:
        heard = Heard(self.clock)
        self.engines[name].submit(self.request(rid, **request), heard)
        return heard

    def pair(self, rid: str = "r", *, room: int = 1, **request: Any) -> tuple[Heard, Heard]:
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": room}
        return (
            self.submit("p", rid, **where, **request),
            self.submit("d", rid, **where, **request),
        )

    def run(self, until: float = float("inf")) -> None:
        self.clock.run(until)


def pd(make: Callable[..., Engine] = Engine, /, **config: Any) -> Servers:
    return Servers(make, p={"role": Role.PREFILL, **config}, d={"role": Role.DECODE, **config})


def prompt(tokens: int, start: int = 1000) -> Any:
    return ids_prompt(range(start, start + tokens))
