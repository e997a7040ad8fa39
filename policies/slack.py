"""The largest predicted slack for each prompt token first, as the Kairos paper prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from policies.moving import Moving
from policies.order import NO_OUTLOOK, Key, Outlook, remaining_tokens, target_us
from policies.types import Job

_SCALE: Final = 10**15
"""Keys are integers: a share of a target for each prompt token, in these parts."""


@dataclass(frozen=True, slots=True)
class Kairos:
    """As printed (Kairos, algorithms 1 and 2): the largest (slack / target) / prompt length first.

    The slack is what is left of the target when the prompt is done, if all go in the order of their
    arrival at the measured rate. Once it is negative, dividing by the length puts the longest of
    the doomed prompts first, against the paper's own words: `salvage` repairs that.
    """

    moves: ClassVar[type[Moving]] = Moving

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        now_us, rate, servers, ahead_tokens = outlook
        queued_tokens = ahead_tokens + remaining_tokens(job)
        queue_us = queued_tokens / (rate * servers) if rate else 0.0
        slack_us = job.deadline_us - now_us - queue_us
        share = _SCALE * slack_us / (target_us(job) * max(1, job.prompt_tokens))
        return (-round(share), job.arrival_us)
