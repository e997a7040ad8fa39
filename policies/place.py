"""Which servers a job goes to, among those that may take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from policies.ledger import Ledger
from policies.types import Job


class Place(Protocol):
    """Smaller ranks win; the core breaks ties by the server's name."""

    def prefill(self, job: Job, ledger: Ledger) -> tuple[float, ...]: ...

    def decode(self, job: Job, ledger: Ledger) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastWork:
    """Fewest prompt tokens outstanding at prefill; the shortest predicted step at decode.

    A server whose hardware is known is predicted by its cost model. For the others the constants
    here are those of an 8B model on an H100 (step tables of AIConfigurator 0.12): between such
    servers only their proportions matter.
    """

    step_fixed_us: float = 6_600.0
    step_per_sequence_us: float = 25.0
    step_per_token_us: float = 0.036

    def prefill(self, job: Job, ledger: Ledger) -> tuple[float, ...]:
        return (ledger.prefill_tokens, ledger.prefills)

    def decode(self, job: Job, ledger: Ledger) -> tuple[float, ...]:
        context = ledger.context_tokens + ledger.foreign_tokens + job.prompt_tokens
        if (steps := ledger.steps) is not None:
            return (steps.decode_us(ledger.decodes + 1, context), ledger.reserved_tokens)
        step_us = (
            self.step_fixed_us
            + self.step_per_sequence_us * (ledger.decodes + 1)
            + self.step_per_token_us * context
        )
        return (step_us, ledger.reserved_tokens)


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Each server in turn, blind to load: a baseline."""

    def prefill(self, job: Job, ledger: Ledger) -> tuple[float, ...]:
        return (ledger.dispatched,)

    def decode(self, job: Job, ledger: Ledger) -> tuple[float, ...]:
        return (ledger.dispatched,)
