"""Orders that know what no gateway can: bounds for comparison, in simulations and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from gateway.simulation.records import Record
from policies.order import NO_OUTLOOK, Key, Order, Outlook, remaining_tokens
from policies.types import Job

AnswerLeft = Callable[[Job], int]
"""Tokens that a job's answer still lacks, as only its server will find out."""


@dataclass(frozen=True, slots=True)
class SrpfOracle:
    """The least left of prompt and answer together first: it is told how long answers will be."""

    answer_left: AnswerLeft
    moves: ClassVar[None] = None

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        return (remaining_tokens(job) + self.answer_left(job), job.arrival_us)


def answer_left(job: Job, record: Record) -> int:
    """What was generated before a preemption is part of the prompt."""
    return record.output_tokens - (job.prompt_tokens - record.prompt_tokens)


NO_ORACLE = "none"
ORACLES: dict[str, Callable[[AnswerLeft], Order] | None] = {
    NO_ORACLE: None,
    "srpf-oracle": SrpfOracle,
}
"""By the names that a scenario's [[policy]] uses; config.toml has no key for them."""
