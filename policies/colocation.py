"""Whether a server may take offline work now: only as much as online work leaves over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.admit import Headroom
from policies.ledger import DISPLACES, SELECTS, Ledger
from policies.types import Job, Kind, Pool, Role

_ONLINE = Kind.ONLINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Colocated(Headroom):
    """Online work is admitted as ever; offline work by what it would do to online work.

    At prefill the prompts outstanding may keep a server busy for a share of the TTFT target at
    most, or it must be idle; unified ones that decode online work take one at a time, and none
    while that goes slowly. A relaxed decode server is filled to its saturation batch. A strict
    one lends what its predicted step leaves below the TPOT target, with room for the online work
    that is expected.
    """

    ttft_us: int = 2_000_000
    tpot_us: int = 100_000
    """The targets where nobody is present who has another one."""
    gate: bool = True
    headroom: bool = True
    gate_share: float = 0.25
    step_share: float = 0.9

    def prefill(self, job: Job, ledger: Ledger) -> bool:
        if not Headroom.prefill(self, job, ledger):
            return False
        if job.kind is _ONLINE or not self.gate:
            return True
        if ledger.worker.role is Role.UNIFIED and ledger.online.count and self._stalls(ledger):
            return False
        if not ledger.prefills or DISPLACES in ledger.worker.engine:
            return True
        rate = ledger.prefill_tokens_per_us
        tokens = ledger.prefill_tokens + ledger.uncached(job)
        return rate is not None and tokens <= rate * self.gate_share * self.ttft_us

    def prefills(self, job: Job, ledgers: Sequence[Ledger]) -> list[Ledger]:
        if job.kind is _ONLINE:
            return Headroom.prefills(self, job, ledgers)
        return [ledger for ledger in ledgers if self.prefill(job, ledger)]

    def _stalls(self, ledger: Ledger) -> bool:
        """A unified server computes prompts instead of decode steps: one offline prompt at a time,
        and none while the tokens of online answers come slowly."""
        online = ledger.online
        most_us = self.step_share * online.tightest_us(self.tpot_us)
        return ledger.offline.prefills > 0 or online.last_pace_us > most_us

    def _stall_us(self, job: Job, ledger: Ledger) -> float:
        """What the prompts of such jobs add to each step of a unified server, for each of them that
        is there: when one ends, another comes."""
        rate = ledger.prefill_tokens_per_us
        answer_tokens = job.made_tokens + self.reserved(job) - job.prompt_tokens
        if rate is None or answer_tokens < 1:
            return 0.0
        return ledger.uncached(job) / rate / answer_tokens

    def decode(self, job: Job, ledger: Ledger) -> bool:
        if not Headroom.decode(self, job, ledger):
            return False
        if job.kind is _ONLINE or ledger.steps is None:
            return True
        if not ledger.decodes and not (self.headroom and ledger.online.expected):
            return True
        if ledger.worker.pool is Pool.RELAXED:
            return not self.gate or ledger.offline.decodes < ledger.steps.saturation
        return self.lends(job, ledger)

    def lends(self, job: Job, ledger: Ledger) -> bool:
        """Whether a strict server has room for it; half of what it may generate counts."""
        assert ledger.steps is not None
        online = ledger.online
        expected = online.expected if self.headroom else 0
        coming = expected * online.tokens_each
        taken = ledger.reserved_tokens + ledger.foreign_tokens + self.reserved(job)
        if ledger.kv_tokens and taken + coming > ledger.kv_tokens * self.kv_watermark:
            return False
        if ledger.max_running and ledger.decodes + expected >= ledger.max_running:
            return False
        if SELECTS in ledger.worker.engine and ledger.worker.role is not Role.UNIFIED:
            return True  # it steps without them where a step would be too long
        context = ledger.context_tokens + ledger.foreign_tokens + coming
        context += (job.prompt_tokens + self.reserved(job)) / 2
        count, held_tokens, offline = ledger.paced_with
        seen_us = ledger.steps.decode_us(count, held_tokens)
        step_us = ledger.steps.decode_us(ledger.decodes + 1 + expected, context)
        if ledger.worker.role is Role.UNIFIED:
            each_us = self._stall_us(job, ledger)
            seen_us += offline * each_us
            step_us += (ledger.offline.decodes + 1) * each_us
        # What a token is seen to take beyond what is predicted, it will take with one more job.
        unexplained_us = max(0.0, online.last_pace_us - seen_us)
        return step_us + unexplained_us <= self.step_share * online.tightest_us(self.tpot_us)
