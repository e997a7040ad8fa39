"""Whether an offline server has to stand still for the online work beside it on the same GPU."""

from __future__ import annotations

from dataclasses import dataclass

from policies.ledger import Ledger
from policies.types import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """By what a token takes while all of a GPU's servers work: as seen and as predicted, the worse.

    Servers that share a GPU get equal shares of its time, so that a step takes as many times as
    long as there are servers at work. What begins at one mark ends at a lower one, and after some
    time at the latest: then the offline work goes elsewhere.
    """

    tpot_us: int = 100_000
    """Where nobody is present who has another target."""
    step_share: float = 0.98
    calm_share: float = 0.9
    ttft_share: float = 0.5
    """A prompt that is predicted to need more of what is left of its TTFT target is in danger."""
    shortest_us: int = 500_000
    longest_us: int = 5_000_000

    def is_in_danger(self, ledger: Ledger, neighbours: int) -> bool:
        return self._is_over(ledger, neighbours, self.step_share)

    def is_calm(self, ledger: Ledger, neighbours: int) -> bool:
        """Whether it would stay out of danger with the neighbours at work again."""
        return not self._is_over(ledger, neighbours, self.calm_share)

    def _is_over(self, ledger: Ledger, neighbours: int, share: float) -> bool:
        online = ledger.online
        if not online.count:
            return False
        most_us = share * online.tightest_us(self.tpot_us)
        if online.pace_us > most_us or ledger.steps is None:
            return online.pace_us > most_us
        held_tokens = ledger.context_tokens + ledger.foreign_tokens
        alone_us = ledger.steps.decode_us(ledger.decodes, held_tokens)
        return (1 + neighbours) * alone_us > most_us

    def is_late(self, job: Job, ledger: Ledger, neighbours: int, now_us: int) -> bool:
        """Whether the first token is in danger of one that has just been sent there. What was seen
        was seen with neighbours at work; where nothing is known, they had better stand still."""
        if ledger.steps is not None:
            rate = ledger.steps.prefill_tokens_per_us / (1 + neighbours)
        else:
            rate = ledger.prefill_rate.tokens_per_us or 0.0
        left_us = max(0, job.deadline_us - now_us)
        return ledger.prefill_tokens > rate * self.ttft_share * left_us
