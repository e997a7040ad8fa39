"""Whether a long prompt that is being computed makes way for a more urgent one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from policies.ledger import Ledger
from policies.order import Order, Outlook, remaining_tokens
from policies.types import Job

UNKNOWN_CHUNK_TOKENS: Final = 8192
"""The chunk of a server that does not tell: the largest of SGLang's defaults for common GPUs."""


class Standing(NamedTuple):
    """Where a prompt stands at its server, as far as the gateway can reckon."""

    job: Job
    """As it would queue again, with what stays in the server's cache."""
    rest_us: float
    """Until it is computed, if it is left alone."""
    lost_us: float
    """What would have to be computed again."""
    times: int
    """It has made way so often already."""


class Displace(Protocol):
    @property
    def least_chunks(self) -> int:
        """Prompts with no more left than this are never asked to make way; 0: nobody is."""
        ...

    def makes_way(self, standing: Standing, head: Job, order: Order, outlook: Outlook) -> bool: ...


@dataclass(frozen=True, slots=True)
class Never:
    """A prompt that has begun is computed to its end."""

    least_chunks: int = 0

    def makes_way(self, standing: Standing, head: Job, order: Order, outlook: Outlook) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ByCost:
    """When the order puts the waiting one first, and that saves more than is computed twice.

    The head of the queue is spared the rest of the long prompt. The long one pays for it with the
    head's own work, and everybody with what is lost of the chunk under way: more than `margin`
    times that has to be saved, or `rescue_margin` times where the head is late if it waits and in
    time if it does not. No prompt makes way more than `most_times`.
    """

    least_chunks: int = 2
    most_times: int = 10
    margin: float = 4.0
    rescue_margin: float = 1.0

    def makes_way(self, standing: Standing, head: Job, order: Order, outlook: Outlook) -> bool:
        if standing.times >= self.most_times:
            return False
        if order.key(head, outlook) >= order.key(standing.job, outlook):
            return False
        own_us = outlook.work_us(remaining_tokens(head))
        soonest_us = outlook.now_us + own_us
        is_rescue = soonest_us <= head.deadline_us < soonest_us + standing.rest_us
        margin = self.rescue_margin if is_rescue else self.margin
        return standing.rest_us > own_us + margin * standing.lost_us


def standing_of(job: Job, ledger: Ledger, sent_us: int, times: int, now_us: int) -> Standing | None:
    """By the time since it was sent and the server's rate; None where nobody knows the rate.

    Chunks that are complete stay in the server's radix cache, but not the last of them: that was
    measured on SGLang 0.5.23. The one under way is lost, and runs to its end first.
    """
    if not (rate := ledger.prefill_tokens_per_us):
        return None
    chunk_tokens = ledger.chunk_tokens or UNKNOWN_CHUNK_TOKENS
    tokens = ledger.uncached(job)
    done_tokens = min(tokens, round(rate * (now_us - sent_us)))
    kept_tokens = max(0, done_tokens // chunk_tokens - 1) * chunk_tokens
    started_tokens = min(tokens, (done_tokens // chunk_tokens + 1) * chunk_tokens)
    kept = job.prompt_tokens - tokens + kept_tokens
    return Standing(
        job=job._replace(cached_tokens=kept, cached_on=ledger.worker.name),
        rest_us=(tokens - done_tokens) / rate,
        lost_us=(started_tokens - kept_tokens) / rate,
        times=times,
    )
