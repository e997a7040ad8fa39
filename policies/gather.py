"""Which prompts a prefill server computes together: short ones by the bucket, long ones alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from policies.ledger import Ledger
from policies.order import target_us
from policies.types import Job


class Gather(Protocol):
    @property
    def holds(self) -> bool:
        """Whether anything is ever held back; else nobody is asked."""
        ...

    @property
    def whole_tokens(self) -> int:
        """Prompts up to this length go to a unified server where one has room."""
        ...

    def due_us(
        self, job: Job, since_us: int, tokens: int, ledgers: Sequence[Ledger], now_us: int
    ) -> int:
        """Until when the first of a queue is held back, if nothing else comes; 0: it is not.

        It might have gone `since_us`, and so many tokens wait with it.
        """
        ...

    def servers(self, job: Job, free: list[Ledger], now_us: int) -> list[Ledger]:
        """Those of the free prefill servers on whose next batch it may go."""
        ...


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Each goes as soon as a server may take it; what waits there, the server batches itself."""

    holds: ClassVar[bool] = False
    whole_tokens: ClassVar[int] = 0

    def due_us(
        self, job: Job, since_us: int, tokens: int, ledgers: Sequence[Ledger], now_us: int
    ) -> int:
        return 0

    def servers(self, job: Job, free: list[Ledger], now_us: int) -> list[Ledger]:
        return free


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLength:
    """DOPD's dispatch: a batch is a bucket of short prompts, or one long one.

    A prompt is long when it fills a batch by itself, that is, from the knee of the server's
    throughput on: company would delay it and make nothing faster. A server has one batch under
    way and at most one more that waits. The queue's order stays: it says who is in which batch.
    """

    holds: ClassVar[bool] = True

    cap_tokens: int = 2_048
    """Of a batch, where the server's hardware is not known."""
    wait_share: float = 0.05
    """Of its TTFT target is what a short prompt may be held back for company,"""
    most_wait_us: int = 50_000
    """but no longer than this."""
    whole_tokens: int = 511
    """Dynamo's limit: the prompt costs a decode step or two, and its KV need not be sent."""

    def due_us(
        self, job: Job, since_us: int, tokens: int, ledgers: Sequence[Ledger], now_us: int
    ) -> int:
        if not ledgers or tokens >= min(map(self.batch_tokens, ledgers)):
            return 0
        due_us = since_us + min(self.most_wait_us, int(self.wait_share * target_us(job)))
        return due_us if due_us > now_us else 0

    def servers(self, job: Job, free: list[Ledger], now_us: int) -> list[Ledger]:
        joined = [e for e in free if e.has_open_batch(now_us) and self._has_room(e, job)]
        return joined or [e for e in free if not e.prefills or not e.has_open_batch(now_us)]

    def batch_tokens(self, ledger: Ledger) -> int:
        return self.cap_tokens if ledger.steps is None else ledger.steps.knee_tokens

    def _has_room(self, ledger: Ledger, job: Job) -> bool:
        return ledger.batch_tokens + ledger.uncached(job) <= self.batch_tokens(ledger)
