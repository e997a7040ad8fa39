"""Which queued job goes next: a key for each, under which the least goes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, Protocol

from policies.queue import KeyedHeap
from policies.types import Job

Key = tuple[int, ...]


class Outlook(NamedTuple):
    """What a key that moves may know of the moment, of the servers and of the rest of the queue."""

    now_us: int = 0
    tokens_per_us: float = 0.0
    """Prompt tokens that one prefill server computes in a microsecond; 0 where nobody knows."""
    servers: int = 1
    ahead_tokens: int = 0
    """Prompt tokens that came earlier and are not computed yet, here and at the servers."""

    def work_us(self, tokens: int) -> float:
        """What one server takes for so many prompt tokens."""
        return tokens / self.tokens_per_us if self.tokens_per_us else 0.0

    def behind(self, tokens: int) -> Outlook:
        """The same moment for a job that has so many more tokens before it."""
        now_us, rate, servers, ahead = self
        return Outlook(now_us, rate, servers, ahead + tokens)


NO_OUTLOOK: Final = Outlook()


class Order(Protocol):
    """Smaller keys go first; the queue breaks ties by id."""

    @property
    def moves(self) -> type[Movement] | None:
        """How keys are kept that change while jobs wait; None where each is computed once."""
        ...

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key: ...


class Movement(Protocol):
    """What a queue knows of its jobs where keys move; it looks at no more of them in a longer one.

    The queue's heap holds the keys as far as they are known; `first` makes up for the rest.
    """

    def add(self, job: Job) -> None: ...

    def discard(self, job: Job) -> None: ...

    def key(self, job: Job, order: Order, outlook: Outlook) -> Key:
        """Under which it goes into the heap."""
        ...

    def turn(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> None:
        """Time has passed: what has to be seen to at every look."""
        ...

    def first(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> str | None: ...


def remaining_tokens(job: Job) -> int:
    """What is to be computed of the prompt; the last token always is."""
    return max(1, job.prompt_tokens - job.cached_tokens)


def target_us(job: Job) -> int:
    """The time that the job was given: its TTFT target online, its window offline."""
    return max(1, job.deadline_us - job.arrival_us)


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served."""

    moves: ClassVar[None] = None

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        return (job.arrival_us,)


@dataclass(frozen=True, slots=True)
class Edf:
    """Earliest deadline first: the most urgent prompt before the oldest one."""

    moves: ClassVar[None] = None

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        return (job.deadline_us, job.arrival_us)


@dataclass(frozen=True, slots=True)
class Shortest:
    """The least left to compute first, as SGLang's `shortest-prefill-first` orders its queue."""

    moves: ClassVar[None] = None

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        return (remaining_tokens(job), job.arrival_us)
