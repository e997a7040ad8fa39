"""Whether a server may take one more job now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.ledger import Ledger
from policies.types import Job


class Admit(Protocol):
    def prefill(self, job: Job, ledger: Ledger) -> bool: ...

    def prefills(self, job: Job, ledgers: Sequence[Ledger]) -> list[Ledger]:
        """Those for which `prefill` holds. While jobs wait, all are asked each time something
        has changed: in one call, because calls would cost more than what they compute."""
        ...

    def decode(self, job: Job, ledger: Ledger) -> bool: ...

    def lacks(self, job: Job, ledger: Ledger) -> tuple[int, float]:
        """The seats and the KV tokens that a decode server is short of for it; 0 and less: none."""
        ...

    def reserved(self, job: Job) -> int:
        """The KV tokens to book for a job whose output length nobody knows."""
        ...

    def fits_ever(self, job: Job, ledger: Ledger) -> bool:
        """Whether the server could take the job if it were empty."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """Late binding at prefill, KV headroom at decode.

    A prefill server gets little more than it can work on, so that the gateway's order stays the
    order. A decode server is filled up to a watermark, because running out costs a retraction.
    """

    prefill_cap_tokens: int = 16_384
    """Prompt tokens outstanding at a server that does not tell its chunk size."""
    prefill_chunks: int = 2
    """The same in chunks, where the chunk size is known."""
    kv_watermark: float = 0.92
    output_reserve_tokens: int = 512
    """Booked for an answer that may be longer; what it really takes is booked as it grows."""

    def prefill(self, job: Job, ledger: Ledger) -> bool:
        if not ledger.prefills or not (before_tokens := ledger.before(job)):
            return self.fits_ever(job, ledger)
        cap = ledger.chunk_tokens * self.prefill_chunks or self.prefill_cap_tokens
        return before_tokens + ledger.uncached(job) <= cap

    def prefills(self, job: Job, ledgers: Sequence[Ledger]) -> list[Ledger]:
        if job.cached_on:  # it is not the same prompt to all of them
            return [e for e in ledgers if self.prefill(job, e)]
        tokens, chunks = job.prompt_tokens - job.cached_tokens, self.prefill_chunks
        return [
            e
            for e in ledgers
            if (
                before + tokens <= (e.chunk_tokens * chunks or self.prefill_cap_tokens)
                if e.prefills and (before := e.before(job))
                else self.fits_ever(job, e)
            )
        ]

    def decode(self, job: Job, ledger: Ledger) -> bool:
        if ledger.max_running and ledger.decodes >= ledger.max_running:
            return False
        if not ledger.kv_tokens:
            return True
        taken = ledger.reserved_tokens + ledger.foreign_tokens
        return taken + self.reserved(job) <= ledger.kv_tokens * self.kv_watermark or (
            not ledger.decodes and self.fits_ever(job, ledger)
        )

    def lacks(self, job: Job, ledger: Ledger) -> tuple[int, float]:
        seats = ledger.decodes + 1 - ledger.max_running if ledger.max_running else 0
        if not ledger.kv_tokens:
            return seats, 0
        taken = ledger.reserved_tokens + ledger.foreign_tokens + self.reserved(job)
        return seats, taken - ledger.kv_tokens * self.kv_watermark

    def reserved(self, job: Job) -> int:
        return job.prompt_tokens + min(job.max_tokens, self.output_reserve_tokens)

    def fits_ever(self, job: Job, ledger: Ledger) -> bool:
        return not ledger.kv_tokens or job.prompt_tokens < ledger.kv_tokens
