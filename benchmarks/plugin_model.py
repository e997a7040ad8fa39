"""The simulator's patched engine over the steps that a real one was seen to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from backends.engine import EngineConfig, Request, Resident, ids_prompt, patched
from policies.clock import VirtualClock
from policies.step_line import StepLine
from policies.types import Role

PACKINGS = {"all": "all", "online-first": "online-paced", "slack": "most-kept"}


@dataclass(frozen=True, slots=True)
class AsMeasured:
    """Prompts are computed elsewhere; here one only joins."""

    line: StepLine
    joins_s: Iterator[float] = field(default_factory=lambda: repeat(0.0))
    """For so long nobody steps as one joins."""
    held: Iterator[float] = field(default_factory=lambda: repeat(1.0))
    """How many times as long as the line says a step takes."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return sum(max(1e-9, next(self.joins_s)) for _ in chunks)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return self.line.step_us(batch, context_tokens) * 1e-6 * next(self.held)


@dataclass(slots=True)
class Told:
    """When its tokens came."""

    clock: VirtualClock
    over: Callable[[], object] | None = None
    times_s: list[float] = field(default_factory=list)
    has_ended: bool = False

    def tokens(self, resident: Resident) -> None:
        self.times_s.append(self.clock.time())

    def finished(self, resident: Resident, reason: dict[str, Any]) -> None:
        self.has_ended = True
        if self.over is not None:
            self.over()

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


class Model:
    """One engine of which the requests are told apart by number."""

    def __init__(
        self,
        times: AsMeasured,
        packing: str,
        hold_steps: int,
        clock: VirtualClock | None = None,
    ) -> None:
        self.clock = clock or VirtualClock()
        config = EngineConfig(
            role=Role.UNIFIED,
            kv_tokens=1_000_000,
            chunk_tokens=1_000_000,
            packing=packing,
            hold_steps=hold_steps,
        )
        self._engine = patched(config, self.clock, times, predicted=AsMeasured(times.line))
        self._sent = 0

    def send(self, row: Row, over: Callable[[], object] | None = None) -> Told:
        self._sent += 1
        start = self._sent * 100_000
        told = Told(self.clock, over)
        request = Request(
            rid=str(self._sent),
            prompt=ids_prompt(range(start, start + row.prompt_tokens)),
            max_new_tokens=row.tokens,
            ignore_eos=True,
            stream=True,
            is_online=row.online,
            tpot_s=row.tpot_ms / 1e3,
        )
        self._engine.submit(request, told)
        return told


def played(line: StepLine, rows: Sequence[Row], mode: str, hold_steps: int) -> list[Told]:
    """All of them decode from the first instant on."""
    model = Model(AsMeasured(line), PACKINGS[mode], hold_steps)
    heard = [model.send(row) for row in rows]
    model.clock.run()
    return heard


def circled(
    times: AsMeasured,
    circles: Sequence[Sequence[Row]],
    packing: str,
    hold_steps: int,
    *,
    again_s: Iterator[float],
    until_s: float,
    begin_s: Iterator[float] | None = None,
    clock: VirtualClock | None = None,
) -> list[list[Told]]:
    """In each circle a request comes some time after the one before it has ended; the first of
    each at once, or as `begin_s` says. The clock is given where the steps go by it."""
    model = Model(times, packing, hold_steps, clock)
    heard: list[list[Told]] = []

    def begin(rows: Iterator[Row], told: list[Told]) -> None:
        if (row := next(rows, None)) is not None:
            told.append(model.send(row, lambda: again(rows, told)))

    def again(rows: Iterator[Row], told: list[Told]) -> None:
        model.clock.call_at(model.clock.time() + next(again_s), begin, rows, told)

    for circle in circles:
        heard.append([])
        at_s = next(begin_s) if begin_s else 0.0
        model.clock.call_at(at_s, begin, iter(circle), heard[-1])
    model.clock.run(until_s)
    return heard
