"""How a long prompt is kept from blocking its server: it makes way, or it goes out in parts."""

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


class Work(NamedTuple):
    """What is to be computed of a prompt at one server, and what may come meanwhile."""

    tokens: int
    chunk_tokens: int
    tokens_per_us: float
    """0 where nobody knows."""
    arrivals_per_us: float
    """Online requests, as seen lately."""
    has_begun: bool
    """A server holds its beginning already."""
    turn_us: float = 0.0
    """What a part has been seen to take beyond its computing."""


class Displace(Protocol):
    @property
    def least_chunks(self) -> int:
        """Prompts with no more left than this are never asked to make way; 0: nobody is."""
        ...

    @property
    def parts(self) -> bool:
        """Whether prompts may go out in parts at all."""
        ...

    def makes_way(self, standing: Standing, head: Job, order: Order, outlook: Outlook) -> bool: ...

    def part_tokens(self, work: Work) -> int:
        """So much of it is sent now, and the rest queues again; 0: all of it is."""
        ...


@dataclass(frozen=True, slots=True)
class Never:
    """A prompt that has begun is computed to its end."""

    least_chunks: int = 0
    parts: bool = False

    def makes_way(self, standing: Standing, head: Job, order: Order, outlook: Outlook) -> bool:
        return False

    def part_tokens(self, work: Work) -> int:
        return 0


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
    parts: bool = False

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

    def part_tokens(self, work: Work) -> int:
        return 0


FIRST_CHUNKS: Final = 2
"""A prompt of no more chunks goes out whole: in parts it would hardly keep others less."""


@dataclass(frozen=True, slots=True)
class Slices:
    """Every long prompt goes out a chunk at a time, and queues again after each."""

    least_chunks: int = 0
    parts: bool = True

    def makes_way(self, standing: Standing, head: Job, order: Order, outlook: Outlook) -> bool:
        return False

    def part_tokens(self, work: Work) -> int:
        most_tokens = work.chunk_tokens if work.has_begun else FIRST_CHUNKS * work.chunk_tokens
        return work.chunk_tokens if work.tokens > most_tokens else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cheapest(ByCost):
    """In parts or whole, by what either is expected to cost while the prompt is computed.

    In parts: a turn for each, in which its server has nothing of it. Whole: each online request
    that comes meanwhile may displace it, `most_times` at most, and that loses the chunk under way
    and the last one before it. Where a turn takes as long as its chunk, the network is what all
    wait for: each part sends what came before it once more.
    """

    turn_us: float = 50_000.0
    """At least: a round trip, a transfer of a chunk's KV and a decode step."""
    lost_chunks: float = 1.5
    parts: bool = True

    def part_tokens(self, work: Work) -> int:
        size = Slices().part_tokens(work)
        if not size or not work.tokens_per_us:
            return 0
        chunk_us = work.chunk_tokens / work.tokens_per_us
        turns = -(-work.tokens // work.chunk_tokens) - 1
        came = work.arrivals_per_us * work.tokens / work.tokens_per_us
        lost_us = min(came, self.most_times) * self.lost_chunks * chunk_us
        turn_us = max(self.turn_us, work.turn_us)
        return size if turn_us < chunk_us and turns * turn_us < lost_us else 0


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
