"""Orders whose keys move as time passes: slack as printed, slack repaired, response ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from policies.order import NO_OUTLOOK, Key, Outlook, remaining_tokens, target_us
from policies.types import Job

_SCALE: Final = 10**15
"""Keys are integers: a share of a target for each prompt token, in these parts."""
_IN_TIME, _DOOMED = 0, 1


@dataclass(frozen=True, slots=True)
class Kairos:
    """As printed (Kairos, algorithms 1 and 2): the largest (slack / target) / prompt length first.

    The slack is what is left of the target when the prompt is done, if all go in the order of their
    arrival at the measured rate. Once it is negative, dividing by the length puts the longest of
    the doomed prompts first, against the paper's own words: `salvage` repairs that.
    """

    moves: ClassVar[bool] = True

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        own_tokens = remaining_tokens(job)
        queue_us = outlook.work_us(outlook.ahead_tokens + own_tokens) / outlook.servers
        slack_us = job.deadline_us - outlook.now_us - queue_us
        share = _SCALE * slack_us / (target_us(job) * max(1, job.prompt_tokens))
        return (-round(share), job.arrival_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """Those that can still be in time before those that cannot; in both, the shortest first.

    A prompt is doomed when its own work alone misses the deadline. One that has waited for
    `guard_targets` of its targets competes by its length again, as if it had just come.
    """

    moves: ClassVar[bool] = True

    guard_targets: float = 5.0

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        own_tokens = remaining_tokens(job)
        done_us = outlook.now_us + outlook.work_us(own_tokens)
        rank = _IN_TIME
        if done_us > job.deadline_us:
            guarded_us = job.arrival_us + self.guard_targets * target_us(job)
            rank = _IN_TIME if outlook.now_us > guarded_us else _DOOMED
        return (rank, own_tokens, job.arrival_us)


@dataclass(frozen=True, slots=True)
class Hrrn:
    """Highest response ratio next: the longest wait for each token of the prompt goes first.

    The ratio is (wait + work) / work. Where work is tokens at one rate, waiting time over tokens
    puts jobs into the same order at any rate.
    """

    moves: ClassVar[bool] = True

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        waited_us = max(0, outlook.now_us - job.arrival_us)
        return (-(1_000_000 * waited_us // remaining_tokens(job)), job.arrival_us)
