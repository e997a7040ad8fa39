"""Which prompts are computed in the next forward pass, and how much of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backends.engine.config import CLIP_NEW_TOKENS
from backends.engine.machine import Machine
from backends.engine.request import Resident, Stage
from backends.engine.schedule import first_of, room_for_shorter, uncached
from policies.types import Role

FIRST_RATIO = 0.7
LAST_RATIO = 0.7 * 0.14
RATIO_DECAY = (FIRST_RATIO - LAST_RATIO) / 600
"""How much of the promised output admission reserves: SGLang's new_token_ratio."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one prompt in one forward pass."""

    resident: Resident
    new_tokens: int
    cached_tokens: int


class Prefilling:
    """The waiting queue and the prompt that is in the middle of its chunks."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.clear()

    def clear(self) -> None:
        self.waiting: dict[int, Resident] = {}
        self.chunked: Resident | None = None
        self.ratio = FIRST_RATIO

    def enqueue(self, resident: Resident) -> None:
        resident.stage = Stage.WAITING
        resident.entered_tokens = self._machine.counters.prefill_uncached_tokens
        self.waiting[resident.serial] = resident

    def remove(self, resident: Resident) -> None:
        self.waiting.pop(resident.serial, None)
        if self.chunked is resident:
            self.chunked = None

    def plan(self, sending: int) -> list[Chunk]:
        """The chunked prompt goes on first; then the queue in order, until one does not fit."""
        chunks: list[Chunk] = []
        budget = self._machine.config.chunk_tokens
        if self.chunked is not None:
            room = room_for_shorter(self._machine, self.chunked, self.waiting.values(), budget)
            chunk = self._continue(self.chunked, room)
            if chunk is None:
                return []
            chunks.append(chunk)
            budget -= chunk.new_tokens
        reserved = 0
        while budget > 0 and self.waiting:
            resident = self._first()
            if self.chunked is not None and not self._fits_beside(resident, budget):
                break
            taken = sending + len(chunks)
            admitted = self._admit(resident, taken, budget, reserved)
            if admitted is None and self._make_way(resident, reserved):
                admitted = self._admit(resident, taken, budget, reserved)
            if admitted is None:
                break
            chunks.append(admitted)
            budget -= admitted.new_tokens
            reserved += self._output_reserve(resident)
        return chunks

    def settle(self, chunks: Iterable[Chunk]) -> list[Resident]:
        """Count a finished pass; answers the prompts that are complete."""
        complete = []
        for chunk in chunks:
            resident = chunk.resident
            resident.prefilled += chunk.new_tokens
            resident.computed_tokens += chunk.new_tokens
            self._machine.counters.prefill_uncached_tokens += chunk.new_tokens
            if not resident.abort_sent:  # its last pass is not kept
                self._machine.share(resident)
            if resident.prefilled == resident.fill_tokens:
                resident.computed_s = resident.computed_s or self._machine.clock.time()
                complete.append(resident)
        return complete

    def gives_way(self, chunks: Iterable[Chunk]) -> bool:
        """Whether a pass in course is to be broken off for what waits."""
        return False

    def undo(self, chunks: Iterable[Chunk]) -> None:
        """A pass was broken off: what earlier ones computed is kept."""
        for chunk in chunks:
            resident, kv = chunk.resident, self._machine.kv
            after = resident.prefilled + chunk.new_tokens
            pages = kv.pages(after) - kv.pages(resident.prefilled)
            kv.give(pages)
            resident.held -= pages

    def uncached_tokens(self) -> int:
        """The work that waits, prefixes not looked up."""
        parts = [resident.fill_tokens for resident in self.waiting.values()]
        if self.chunked is not None:
            parts.append(self.chunked.fill_tokens - self.chunked.prefilled)
        return sum(parts)

    def _first(self) -> Resident:
        if self._machine.config.priority:
            return min(self.waiting.values(), key=urgency)
        return first_of(self._machine, self.waiting)

    def _fits_beside(self, resident: Resident, budget: int) -> bool:
        """Only one prompt at a time is in the middle of its chunks."""
        cuts = self._machine.config.schedule_policy == "shortest-prefill-first"
        return cuts and uncached(self._machine, resident) <= budget

    def _spare(self, reserved: int) -> int:
        """Memory that neither those who run nor those just admitted will need."""
        machine = self._machine
        return machine.kv.available - machine.batch.promised_tokens(self.ratio) - reserved

    def _make_way(self, resident: Resident, reserved: int) -> bool:
        """Less urgent running requests give way, the least urgent and newest first, or none.

        As SGLang does, what they hold counts for nothing here, only what they may still take.
        """
        machine = self._machine
        if not machine.config.priority or machine.role != Role.UNIFIED:
            return False
        missing = resident.fill_tokens + self._output_reserve(resident) - self._spare(reserved)
        least = priority_of(resident) - machine.config.preemption_threshold
        victims: list[Resident] = []
        for victim in sorted(machine.batch.members.values(), key=urgency, reverse=True):
            if priority_of(victim) >= least or (victims and missing <= 0):
                break
            victims.append(victim)
            ratio = 1.0 if victim.request.ignore_eos else self.ratio
            missing -= int(self._output_reserve(victim) * ratio)
        if not victims or missing > 0:
            return False
        for victim in victims:
            machine.retract(victim)
            self.enqueue(victim)
        return True

    def _output_reserve(self, resident: Resident) -> int:
        if self._machine.role == Role.PREFILL:
            return 1
        return min(resident.budget - resident.generated, CLIP_NEW_TOKENS)

    def _admit(
        self, resident: Resident, taken_slots: int, budget: int, reserved: int
    ) -> Chunk | None:
        kv = self._machine.kv
        if len(self._machine.batch) + taken_slots >= self._machine.config.max_running:
            return None
        fill = resident.fill_tokens
        prompt = resident.full_prompt()
        node, matched = kv.match(resident.request.space, prompt, fill - 1)
        if node is not None:
            kv.cache.lock(node)
        rest = fill - matched
        new = rest if rest <= budget else kv.whole(budget)
        needed = kv.pages(rest + self._output_reserve(resident))
        if new == 0 or needed > self._spare(reserved) or not kv.take(kv.pages(new)):
            if node is not None:
                kv.cache.unlock(node)
            return None
        resident.node, resident.shared, resident.prefilled = node, matched, matched
        resident.held = kv.pages(new)
        if not resident.generated_before:
            resident.cached_tokens = matched
            self._machine.counters.prefill_cached_tokens += matched
        resident.stage = Stage.PREFILL
        if resident.began_s is None:
            resident.began_s = self._machine.clock.time()
        del self.waiting[resident.serial]
        if new < rest:
            self.chunked = resident
        return Chunk(resident, new, matched)

    def _continue(self, resident: Resident, budget: int) -> Chunk | None:
        kv = self._machine.kv
        rest = resident.fill_tokens - resident.prefilled
        new = rest if rest <= budget else max(kv.page, kv.whole(budget))
        pages = kv.pages(resident.prefilled + new) - kv.pages(resident.prefilled)
        if not kv.take(pages):
            return None
        resident.held += pages
        if new == rest:
            self.chunked = None
        return Chunk(resident, new, resident.prefilled)


def priority_of(resident: Resident) -> float:
    """No priority is the worst one."""
    priority = resident.request.priority
    return float("-inf") if priority is None else priority


def urgency(resident: Resident) -> tuple[float, int]:
    """Larger priorities first, those without one last, then in order of arrival."""
    return (-priority_of(resident), resident.serial)
