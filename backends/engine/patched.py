"""An engine that can do more than SGLang: choose who decodes, order each chunk, stop in a layer."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from backends.engine.batch import DecodeBatch
from backends.engine.config import EngineConfig
from backends.engine.decoding import Decoding
from backends.engine.engine import Engine, Parts
from backends.engine.fabric import Fabric
from backends.engine.machine import Machine
from backends.engine.prefilling import Chunk, Prefilling
from backends.engine.request import Resident
from backends.steptimes import StepTimes
from policies.clock import Clock
from policies.packing import PACKING, All, Running
from policies.step_table import StepTable
from policies.stepping import elected, holding
from policies.urgency import OLDEST_EVERY, PREFILL_ORDER, Speed, Waiting

SPEED_SEEN_TOKENS = 1 << 20
"""Before so much was computed, the speed of prefill is in part still the predicted one."""


class PackedBatch(DecodeBatch):
    """Whoever is left out of a step joins, as it were, one step later."""

    def __init__(self, page: int) -> None:
        super().__init__(page)
        self.stepping: list[Resident] = []
        self._waited: list[Resident] = []

    def leave(self, resident: Resident) -> None:
        super().leave(resident)
        if resident in self.stepping:
            self.stepping.remove(resident)

    def elect(self, stepping: list[Resident]) -> None:
        self.stepping = stepping

    def tokens_due(self) -> int:
        page = self._page
        if page == 1:
            return len(self.stepping)
        return sum(page for it in self.stepping if self.context_of(it) % page == 0)

    def pass_step(self) -> None:
        waited, self._waited = self._waited, []
        if len(self.stepping) < len(self.members):
            chosen = {it.serial for it in self.stepping}
            self._waited = [it for it in self.members.values() if it.serial not in chosen]
        again = {it.serial for it in self._waited}
        for resident in waited:
            if resident.serial not in again:
                resident.skipped = 0
        for resident in self._waited:
            self._defer(resident)
        self.steps += 1
        self.context_tokens += len(self.stepping)

    def step(self) -> list[Resident]:
        self.pass_step()
        over: list[Resident] = []
        while self._ends and self._ends[0][0] <= self.steps:
            _, serial, resident = heapq.heappop(self._ends)
            if self.members.get(serial) is not resident:
                continue
            if self._is_over(resident):
                over.append(resident)
                self.leave(resident)
            else:
                left = max(1, resident.limit - resident.generated)
                heapq.heappush(self._ends, (self.steps + left, serial, resident))
        return over

    def _defer(self, resident: Resident) -> None:
        self._due_by_residue[self._residue(resident)] -= 1
        resident.joined += 1
        resident.skipped += 1
        self._due_by_residue[self._residue(resident)] += 1
        self._budget_ends[resident.request.ignore_eos] += 1


class Packed(Decoding):
    """Each step of those that the packing chooses."""

    def __init__(
        self,
        machine: Machine,
        prefilling: Prefilling,
        retracted: Callable[[Resident], None],
        predicted: StepTimes,
    ) -> None:
        super().__init__(machine, prefilling, retracted)
        self._packing = holding(PACKING[machine.config.packing], machine.config.hold_steps)
        profile = partial(_predicted_us, predicted, straggler=machine.config.straggler)
        if self._packing.by_longest and not machine.config.straggler:
            profile = partial(_profiled_us, predicted)
        by_longest = self._packing.by_longest or machine.config.straggler
        self.table = StepTable(profile, by_longest=by_longest)
        self._planned = (0, 0, 0)
        self._present: frozenset[int] = frozenset()
        self._held = 0

    def plan(self) -> int:
        self._elect()
        return len(self._packed.stepping) if super().plan() else 0

    def seconds(self, times: StepTimes) -> float:
        count, context, longest = self._planned = self._size()
        return times.decode_s(count, longest if self._machine.config.straggler else context)

    def settle(self, step_us: float) -> None:
        machine, batch = self._machine, self._packed
        self.table.observe(*self._planned, step_us)
        machine.counters.decoded(len(batch.stepping), step_us, since_launch_us=self._last_step_us)
        self._last_step_us = step_us
        stepped = list(batch.stepping) if batch.streaming else []
        over = batch.step()
        for resident in stepped:
            if resident.serial in batch.streaming:
                resident.listener.tokens(resident)
        for resident in over:
            machine.end(resident, resident.end_reason or resident.natural_end)

    def _retract(self) -> None:
        """Those chosen who are left step; where none is, others are chosen, and need memory too."""
        batch, kv = self._packed, self._machine.kv
        while True:
            super()._retract()
            if not batch.stepping:
                self._elect()
            if batch.tokens_due() <= kv.available or len(batch) <= 1:
                return

    @property
    def _packed(self) -> PackedBatch:
        batch = self._machine.batch
        assert isinstance(batch, PackedBatch)
        return batch

    def _elect(self) -> None:
        batch, now_s = self._packed, self._machine.clock.time()
        members = list(batch.members.values())
        if isinstance(self._packing, All):
            batch.elect(members)
            return
        present = frozenset(it.serial for it in members)
        is_held = present == self._present and self._held < self._machine.config.hold_steps
        if is_held and all(it.end_reason is None for it in members):
            self._held += 1
            return
        self._present, self._held = present, 1
        running = [_running(it, batch.steps, now_s) for it in members]
        batch.elect([members[i] for i in elected(self._packing, running, self.table.step_us)])

    def _size(self) -> tuple[int, int, int]:
        """How many step, their tokens together, and the longest's."""
        batch = self._packed
        if len(batch.stepping) == len(batch):
            return len(batch), batch.context_tokens, batch.longest_tokens
        tokens = [it.prefilled + batch.steps - it.joined for it in batch.stepping]
        return len(tokens), sum(tokens), max(tokens, default=0)


class Urgent(Prefilling):
    """The order is decided anew for each chunk, and prompts in their middle may have to wait."""

    def __init__(self, machine: Machine, predicted: StepTimes) -> None:
        super().__init__(machine)
        self._order = PREFILL_ORDER[machine.config.prefill_order]
        self._oldest_every = OLDEST_EVERY.get(machine.config.prefill_order, 0)
        chunk = machine.config.chunk_tokens
        self._first_us = predicted.prefill_s([(chunk, 0)]) * 1e6 / chunk
        self._passes = 0

    def clear(self) -> None:
        super().clear()
        self.begun: dict[int, Resident] = {}

    def remove(self, resident: Resident) -> None:
        super().remove(resident)
        self.begun.pop(resident.serial, None)

    def plan(self, sending: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget, reserved = self._machine.config.chunk_tokens, 0
        for resident in self._in_order():
            if budget <= 0 or (chunks and self._is_other_class(resident, chunks[0].resident)):
                break
            while self._lacks_memory(resident, budget, reserved):
                if not self._put_back(resident, chunks):
                    break
            chunk = self._take(resident, sending + len(chunks), budget, reserved)
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= chunk.new_tokens
            reserved += self._output_reserve(resident)
        self._passes += bool(chunks)
        return chunks

    def gives_way(self, chunks: Iterable[Chunk]) -> bool:
        if any(chunk.resident.request.is_online for chunk in chunks):
            return False
        others = [*self.waiting.values(), *self.begun.values()]
        return any(it.request.is_online for it in others)

    def undo(self, chunks: Iterable[Chunk]) -> None:
        chunks = list(chunks)
        super().undo(chunks)
        for chunk in chunks:
            self.begun[chunk.resident.serial] = chunk.resident

    def uncached_tokens(self) -> int:
        begun = sum(it.fill_tokens - it.prefilled for it in self.begun.values())
        return super().uncached_tokens() + begun

    def _in_order(self) -> list[Resident]:
        queued = [*self.begun.values(), *self.waiting.values()]
        queued.sort(key=lambda it: it.serial)
        if self._oldest_every and self._passes % self._oldest_every == 0:
            return sorted(queued, key=lambda it: not it.request.is_online)
        keys = self._order([_waiting(it) for it in queued], self._speed())
        ordered = [it for _, it in sorted(zip(keys, queued, strict=True), key=_key_then_serial)]
        if self._machine.config.interrupt_layers:
            ordered.sort(key=lambda it: not it.request.is_online)
        return ordered

    def _speed(self) -> Speed:
        """The mean so far; the first passes count beside what was predicted."""
        counters = self._machine.counters
        weight = max(0, SPEED_SEEN_TOKENS - counters.prefill_uncached_tokens)
        tokens = counters.prefill_uncached_tokens + weight
        busy_us = counters.prefill_busy_us + weight * self._first_us
        return Speed(self._machine.clock.time() * 1e6, tokens / busy_us)

    def _is_other_class(self, resident: Resident, first: Resident) -> bool:
        """A pass that may be broken off holds offline prompts only."""
        is_online = resident.request.is_online
        return bool(self._machine.config.interrupt_layers) and (
            is_online is not first.request.is_online
        )

    def _take(self, resident: Resident, slots: int, budget: int, reserved: int) -> Chunk | None:
        if resident.serial not in self.begun:
            chunk = self._admit(resident, slots, budget, reserved)
        else:
            chunk = self._continue(resident, budget)
        self.chunked = None
        if chunk is not None:
            self.begun.pop(resident.serial, None)
            if resident.prefilled + chunk.new_tokens < resident.fill_tokens:
                self.begun[resident.serial] = resident
        return chunk

    def _lacks_memory(self, resident: Resident, budget: int, reserved: int) -> bool:
        rest, kv = resident.fill_tokens - resident.prefilled, self._machine.kv
        if resident.serial in self.begun:
            return kv.pages(min(rest, budget)) > kv.available
        return kv.pages(rest + self._output_reserve(resident)) > self._spare(reserved)

    def _put_back(self, urgent: Resident, chunks: Sequence[Chunk]) -> bool:
        """The prompt in its middle that is last in the order gives its memory to a more urgent one;
        what it has computed may be forgotten, and is found again if it is not."""
        inside = {chunk.resident.serial for chunk in chunks} | {urgent.serial}
        others = (it for it in reversed(self._in_order()) if it.serial in self.begun)
        victim = next((it for it in others if it.serial not in inside), None)
        if victim is None:
            return False
        del self.begun[victim.serial]
        self._machine.release(victim, keep=True)
        self.enqueue(victim)
        return True


def _running(resident: Resident, steps: int, now_s: float) -> Running:
    request, passed = resident.request, steps - resident.joined
    first_s = now_s if resident.first_token_s is None else resident.first_token_s
    return Running(
        resident.prefilled + passed,
        resident.generated_before + passed - 1,
        (now_s - first_s) * 1e6,
        request.tpot_s * 1e6,
        resident.skipped,
        request.is_online,
        resident.end_reason is not None,
    )


def _waiting(resident: Resident) -> Waiting:
    request = resident.request
    arrived_s = resident.arrived_s if request.arrived_s is None else request.arrived_s
    return Waiting(
        arrival_us=arrived_s * 1e6,
        rest_tokens=resident.fill_tokens - resident.prefilled,
        prompt_tokens=resident.fill_tokens,
        ttft_us=request.ttft_s * 1e6,
        is_online=request.is_online,
        max_tokens=resident.budget,
    )


def _key_then_serial(pair: tuple[tuple[float, ...], Resident]) -> tuple[tuple[float, ...], int]:
    return pair[0], pair[1].serial


def _predicted_us(
    times: StepTimes, count: int, context: int, longest: int, *, straggler: bool
) -> float:
    return times.decode_s(count, longest if straggler else context) * 1e6


def _profiled_us(times: StepTimes, count: int, context: int, longest: int) -> float:
    """As a profile of equal lengths has it: so many sequences of the longest one's length."""
    return times.decode_s(count, count * longest) * 1e6


def patched(
    config: EngineConfig,
    clock: Clock,
    times: StepTimes,
    fabric: Fabric | None = None,
    predicted: StepTimes | None = None,
) -> Engine:
    """`predicted` is what the engine believes of its steps before it has seen any."""
    belief = predicted or times
    parts = Parts(
        batch=PackedBatch,
        prefilling=partial(Urgent, predicted=belief),
        decoding=partial(Packed, predicted=belief),
    )
    return Engine(config, clock, times, fabric, parts)
