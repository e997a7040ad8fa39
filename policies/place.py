"""Which servers a job goes to, among those that may take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.ledger import Ledger
from policies.types import Job

Ledgers = Sequence[Ledger]


class Place(Protocol):
    """A rank for each server; the lowest wins, and in a tie the first of the list.

    All are ranked in one call: a call for each would cost more than what it computes.
    """

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]: ...

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]: ...


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

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]:
        if job.cached_on:
            return [ledger.prefill_tokens + ledger.uncached(job) for ledger in ledgers]
        return [ledger.prefill_tokens for ledger in ledgers]

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]:
        prompt_tokens, draw = float(job.prompt_tokens), self._draw
        lines = [ledger.line or draw(ledger) for ledger in ledgers]
        return [alone_us + token_us * prompt_tokens for alone_us, token_us in lines]

    def _draw(self, ledger: Ledger) -> tuple[float, float]:
        """Few books change between two decisions: what the others add up to is kept."""
        held_tokens = ledger.context_tokens + ledger.foreign_tokens
        if ledger.steps is not None:
            ledger.line = ledger.steps.line(ledger.decodes + 1, held_tokens)
        else:
            token_us, sequence_us = self.step_per_token_us, self.step_per_sequence_us
            step_us = self.step_fixed_us + sequence_us * (ledger.decodes + 1)
            ledger.line = (step_us + token_us * held_tokens, token_us)
        return ledger.line


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Each server in turn, blind to load: a baseline."""

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]:
        return [ledger.dispatched for ledger in ledgers]

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]:
        return [ledger.dispatched for ledger in ledgers]
