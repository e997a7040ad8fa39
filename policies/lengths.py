"""Decode servers that keep short and long contexts apart, with a boundary that moves by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import ClassVar

from policies.ledger import Ledger
from policies.place import LeastWork
from policies.types import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSplit:
    """Like with like: the server whose mean context is nearest, at equal predicted steps.

    One long context makes the step of all that share its server longer. A rank is the step
    predicted there, times one plus `apart` for each factor e between the prompt and the mean
    context. So there is no fixed boundary: the server with the longer steps takes fewer lengths,
    and the boundary moves until the predicted times per token are even. An empty server is near
    to everybody.
    """

    by_prefix: ClassVar[bool] = False

    apart: float = 0.5

    def prefill(self, job: Job, ledgers: Sequence[Ledger]) -> list[float]:
        return LeastWork().prefill(job, ledgers)

    def decode(self, job: Job, ledgers: Sequence[Ledger]) -> list[float]:
        steps_us = LeastWork().decode(job, ledgers)
        return [
            step_us * (1 + self.apart * self._distance(job, ledger))
            for step_us, ledger in zip(steps_us, ledgers, strict=True)
        ]

    @staticmethod
    def _distance(job: Job, ledger: Ledger) -> float:
        if not ledger.decodes or ledger.context_tokens <= 0:
            return 0.0
        mean = ledger.context_tokens / ledger.decodes
        return abs(log(max(1, job.prompt_tokens) / mean))
