"""Whether a failed attempt is tried again, and when; prompt tokens are what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from policies.events import Fault, Reason
from policies.types import Job, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRule:
    online_attempts: int = 3
    offline_attempts: int = 10
    backoff_us: int = 250_000
    """Offline work waits this long before its second attempt, and twice as long each time after."""
    backoff_max_us: int = 30_000_000
    burst_tokens: int = 262_144
    """Prompt tokens that retries may compute again before they must be earned."""
    share: float = 0.2
    """What each fresh prompt token earns: retries stay below this share of the load."""

    def attempts(self, kind: Kind) -> int:
        return self.online_attempts if kind is Kind.ONLINE else self.offline_attempts

    def delay_us(self, kind: Kind, attempt: int) -> int:
        """Online work goes again at once: a pause would cost it its target."""
        if kind is Kind.ONLINE:
            return 0
        return int(min(self.backoff_us * 2 ** (attempt - 1), self.backoff_max_us))


class RetryBudget:
    """A bucket of prompt tokens: fresh work fills it, retries drain it."""

    __slots__ = ("_rule", "tokens")

    def __init__(self, rule: RetryRule) -> None:
        self._rule = rule
        self.tokens: float = rule.burst_tokens

    def earn(self, job: Job) -> None:
        rule = self._rule
        if self.tokens < rule.burst_tokens:
            gained = self.tokens + rule.share * job.prompt_tokens
            self.tokens = min(gained, rule.burst_tokens)

    def refusal(self, job: Job, attempt: int, fault: Fault, now_us: int) -> Reason | None:
        """Why there is no further attempt; `attempt` counts those that were made."""
        if fault is Fault.REQUEST:
            return Reason.BAD_REQUEST
        if attempt >= self._rule.attempts(job.kind):
            return Reason.ATTEMPTS
        if job.kind is Kind.ONLINE and job.prompt_tokens > self.tokens:
            return Reason.RETRY_BUDGET
        if now_us >= job.give_up_us:
            return Reason.EXPIRED
        return None

    def spend(self, job: Job) -> None:
        """Offline retries are bounded by their pauses: they never take what online ones need."""
        if job.kind is Kind.ONLINE:
            self.tokens -= job.prompt_tokens

    def adopt(self, rule: RetryRule) -> None:
        self._rule = rule
        self.tokens = min(self.tokens, rule.burst_tokens)


def continued(job: Job, generated: int, now_us: int) -> Job:
    """The rest of a job: what it has generated is part of its prompt now.

    The client of an online stream reads already: it waits for its target's time once more.
    """
    if not generated:
        return job
    give_up_us = job.give_up_us
    if job.kind is Kind.ONLINE:
        give_up_us = max(give_up_us, now_us + job.deadline_us - job.arrival_us)
    return job._replace(
        prompt_tokens=job.prompt_tokens + generated,
        max_tokens=max(1, job.max_tokens - generated),
        give_up_us=give_up_us,
        made_tokens=job.made_tokens + generated,
    )
