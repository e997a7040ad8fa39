"""The next token of every running request, and who gives way when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backends.engine.machine import Machine
from backends.engine.prefilling import LAST_RATIO, RATIO_DECAY, Prefilling
from backends.engine.request import Resident, aborted
from backends.steptimes import StepTimes

RETRACT_STEPS = 20
"""How many tokens ahead the share of promised output is estimated after a retraction."""

OUT_OF_MEMORY = (
    "Out of memory even after retracting all other requests in the decode batch. "
    "Aborting the last request."
)


class Decoding:
    """Steps of the running batch."""

    def __init__(
        self, machine: Machine, prefilling: Prefilling, retracted: Callable[[Resident], None]
    ) -> None:
        self._machine = machine
        self._prefilling = prefilling
        self._retracted = retracted
        self._last_step_us = 0.0

    def interrupt(self) -> None:
        """Something else ran, or nothing: the next step follows none."""
        self._last_step_us = 0.0

    def plan(self) -> int:
        """Make room for a step; answers how many requests take part."""
        batch, kv = self._machine.batch, self._machine.kv
        if not batch.members:
            return 0
        due = batch.tokens_due()
        if due > kv.available:
            self._retract()
            due = batch.tokens_due()
        if not kv.take(due):
            self._give_up()
            return 0
        ratio = self._prefilling.ratio
        self._prefilling.ratio = max(LAST_RATIO, ratio - RATIO_DECAY)
        return len(batch.members)

    def seconds(self, times: StepTimes) -> float:
        """Of the planned step."""
        batch, straggler = self._machine.batch, self._machine.config.straggler
        return times.decode_s(
            len(batch), batch.longest_tokens if straggler else batch.context_tokens
        )

    def foreseen(self, most: int) -> int:
        """How many steps from the planned one on nothing inside the server can disturb.

        A decode server takes nobody in whom it could not take now, because memory only shrinks.
        """
        machine = self._machine
        batch, queue = machine.batch, self._prefilling
        if batch.streaming or queue.waiting or queue.chunked is not None:
            return 1
        if machine.config.straggler:
            return 1
        steps = min(most, batch.steps_to_first_end)
        return steps if len(batch) * (steps + machine.kv.page) <= machine.kv.available else 1

    def passed(self, steps_us: Sequence[float]) -> None:
        """Count foreseen steps, and plan as many anew as have begun."""
        machine, batch = self._machine, self._machine.batch
        machine.counters.decoded_alike(len(batch), steps_us)
        for _ in steps_us:
            batch.pass_step()
            machine.kv.take(batch.tokens_due())
        ratio = self._prefilling.ratio - len(steps_us) * RATIO_DECAY
        self._prefilling.ratio = max(LAST_RATIO, ratio)

    def settle(self, step_us: float) -> None:
        """Count a finished step, tell who listens, and end who is done."""
        machine = self._machine
        machine.counters.decoded(len(machine.batch), step_us, since_launch_us=self._last_step_us)
        self._last_step_us = step_us
        over = machine.batch.step()
        for resident in list(machine.batch.streaming.values()):
            resident.listener.tokens(resident)
        for resident in over:
            machine.end(resident, resident.end_reason or resident.natural_end)

    def _retract(self) -> None:
        """Those with the fewest tokens generated go first, the longest prompt among them."""
        batch, kv = self._machine.batch, self._machine.kv
        victims = sorted(
            batch.members.values(),
            key=lambda it: (it.generated, -it.request.prompt.tokens, -it.serial),
        )
        for victim in victims[:-1]:
            if batch.tokens_due() <= kv.available:
                break
            self._machine.retract(victim)
            self._retracted(victim)
        self._raise_ratio()

    def _give_up(self) -> None:
        for resident in list(self._machine.batch.members.values()):
            self._machine.end(resident, aborted(OUT_OF_MEMORY, 500), keep=False)

    def _raise_ratio(self) -> None:
        members = self._machine.batch.members.values()
        decoded = sum(it.generated for it in members) + RETRACT_STEPS * len(members)
        asked = sum(it.budget for it in members) + 1
        self._prefilling.ratio = min(1.0, decoded / asked)
