"""The simulator's patched engine over the steps that a real one was seen to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.engine import EngineConfig, Request, Resident, ids_prompt, patched
from policies.clock import VirtualClock
from policies.step_line import StepLine
from policies.types import Role

PACKINGS = {"all": "all", "online-first": "online-exact", "slack": "slack"}


@dataclass(frozen=True, slots=True)
class AsMeasured:
    """Prompts cost nothing here: they are computed elsewhere."""

    line: StepLine

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return 1e-9 * len(chunks)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return self.line.step_us(batch, context_tokens) * 1e-6


@dataclass(slots=True)
class Told:
    """When its tokens came."""

    clock: VirtualClock
    times_s: list[float] = field(default_factory=list)

    def tokens(self, resident: Resident) -> None:
        self.times_s.append(self.clock.time())

    def finished(self, resident: Resident, reason: dict[str, Any]) -> None:
        return

    def lost(self, resident: Resident) -> None:
        return

    @property
    def tpot_ms(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) * 1e3 / (len(self.times_s) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    prompt_tokens: int
    tokens: int
    online: bool = True
    tpot_ms: float = 0.0


def played(line: StepLine, rows: Sequence[Row], mode: str, hold_steps: int) -> list[Told]:
    """All of them decode from the first instant on."""
    clock = VirtualClock()
    config = EngineConfig(
        role=Role.UNIFIED,
        kv_tokens=1_000_000,
        chunk_tokens=1_000_000,
        packing=PACKINGS[mode],
        hold_steps=hold_steps,
    )
    engine = patched(config, clock, AsMeasured(line))
    heard = []
    for index, row in enumerate(rows):
        start = 1 + index * 100_000
        told = Told(clock)
        request = Request(
            rid=str(index),
            prompt=ids_prompt(range(start, start + row.prompt_tokens)),
            max_new_tokens=row.tokens,
            ignore_eos=True,
            stream=True,
            is_online=row.online,
            tpot_s=row.tpot_ms / 1e3,
        )
        engine.submit(request, told)
        heard.append(told)
    clock.run()
    return heard
