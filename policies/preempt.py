"""Which offline jobs are taken off a server so that online work keeps its targets: just enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from policies.ledger import Ledger
from policies.sizing import preferred_length
from policies.types import Job, Resume


class Victim(NamedTuple):
    """An offline job at a server as seen by whoever has to choose."""

    job_id: str
    prefill_tokens: int
    """Prompt tokens that are not yet computed here; 0 once the prompt is."""
    context_tokens: int
    reserved_tokens: int
    sent_us: int
    flows: bool = True
    """Tokens come. Before that its KV is on its way, and breaking a transfer costs two servers."""
    preemptions: int = 0
    resume: Resume = Resume.EXACT
    left_tokens: float = 0.0
    """What it will yet generate, if it is like those before it."""


Victims = Sequence[Victim]


class GiveWay(Protocol):
    """Empty answers leave everybody where they are. Given are those that are not leaving already,
    and the books without those that are."""

    def for_prefill(self, job: Job, ahead: Ahead, victims: Victims, now_us: int) -> Victims:
        """Whose prompts are in the way of this one."""
        ...

    def for_decode(self, need: Need, victims: Victims) -> Victims:
        """Who makes that much room."""
        ...

    @property
    def acts(self) -> bool:
        """Whether it ever names anybody."""
        ...

    def may_be_over(self, ledger: Ledger) -> bool:
        """Asked after every token: whether it is worth a look at who is there."""
        ...

    def over(self, ledger: Ledger, leaving: Leaving, victims: Victims) -> Victims:
        """Who makes the steps of this server too long."""
        ...

    def may_pull(self, strict: Ledger, relaxed: Ledger) -> bool:
        """Asked at every report, of every pair: whether it is worth a look at who is there."""
        ...

    def pull(self, strict: Ledger, relaxed: Ledger, victims: Victims) -> Victim | None:
        """Which job of a relaxed server is better off at a strict one that has room."""
        ...


class Ahead(NamedTuple):
    """What a prompt finds before it at a prefill server."""

    tokens: float
    """Still to be computed, offline ones that are leaving left out."""
    under_way: float
    """Computed already of the prompt that is being computed."""
    tokens_per_us: float | None
    chunk_tokens: int


class Need(NamedTuple):
    seats: int
    tokens: float


class Leaving(NamedTuple):
    """Offline jobs whose legs are closing: their part of the books is as good as free."""

    jobs: int = 0
    prefill_tokens: int = 0
    context_tokens: int = 0
    reserved_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Stay:
    """Whoever runs may end."""

    acts: ClassVar[bool] = False

    def may_be_over(self, ledger: Ledger) -> bool:
        return False

    def for_prefill(self, job: Job, ahead: Ahead, victims: Victims, now_us: int) -> Victims:
        return ()

    def for_decode(self, need: Need, victims: Victims) -> Victims:
        return ()

    def over(self, ledger: Ledger, leaving: Leaving, victims: Victims) -> Victims:
        return ()

    def may_pull(self, strict: Ledger, relaxed: Ledger) -> bool:
        return False

    def pull(self, strict: Ledger, relaxed: Ledger, victims: Victims) -> Victim | None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForSlack:
    """As many as it takes to bring the slack back, the newest first: they lose least.

    Those that were taken off `protect_after` times are left alone while others will do, and at
    prefill for as long as the online prompt keeps its target behind them.
    """

    acts: ClassVar[bool] = True
    tpot_us: int = 100_000
    """Where nobody is present who has another target."""
    ttft_share: float = 0.5
    """A prompt that is predicted to need more of its TTFT target than this is in a hurry."""
    step_share: float = 0.98
    protect_after: int = 3
    pulls: bool = False
    by_bottleneck: bool = False
    """Where attention bounds the step the longest goes first, instead of the newest."""

    def for_prefill(self, job: Job, ahead: Ahead, victims: Victims, now_us: int) -> Victims:
        due_us = job.arrival_us + self.ttft_share * (job.deadline_us - job.arrival_us)
        tokens = job.prompt_tokens - job.cached_tokens
        chosen = self._until(
            self._excess(ahead, tokens, now_us, due_us),
            self._worth(ahead, [v for v in victims if v.preemptions < self.protect_after]),
        )
        freed = sum(v.prefill_tokens for v in chosen)
        late = self._excess(ahead, tokens, now_us, job.deadline_us) - freed
        old = [v for v in victims if v.preemptions >= self.protect_after]
        return [*chosen, *self._until(late, self._worth(ahead, old))]

    @staticmethod
    def _excess(ahead: Ahead, tokens: int, now_us: int, due_us: float) -> float:
        """Tokens too many before it. While no rate is known a chunk is as much as may be."""
        if ahead.tokens_per_us is None:
            return ahead.tokens - ahead.chunk_tokens
        return ahead.tokens + tokens - ahead.tokens_per_us * max(0.0, due_us - now_us)

    @staticmethod
    def _worth(ahead: Ahead, victims: Victims) -> Victims:
        """Newest first. What ends within a chunk is sooner done than undone."""
        ranked = sorted(victims, key=lambda v: (-v.sent_us, v.job_id))
        oldest = min(victims, key=lambda v: (v.sent_us, v.job_id), default=None)
        return [
            v
            for v in ranked
            if v is not oldest or v.prefill_tokens - ahead.under_way > ahead.chunk_tokens
        ]

    @staticmethod
    def _until(tokens: float, victims: Victims) -> list[Victim]:
        chosen: list[Victim] = []
        for victim in victims:
            if tokens <= 0:
                break
            chosen.append(victim)
            tokens -= victim.prefill_tokens
        return chosen

    def for_decode(self, need: Need, victims: Victims) -> Victims:
        """All or nothing: who makes no room for it is not taken off for nothing."""
        seats, tokens = need
        chosen: list[Victim] = []
        for victim in self._ranked(victims):
            if seats <= 0 and tokens <= 0:
                break
            chosen.append(victim)
            seats, tokens = seats - 1, tokens - victim.reserved_tokens
        return chosen if seats <= 0 and tokens <= 0 else ()

    def may_be_over(self, ledger: Ledger) -> bool:
        """With those that are leaving: without them steps are shorter."""
        online, steps = ledger.online, ledger.steps
        if not online.count:
            return False
        target_us = online.tightest_us(self.tpot_us)
        if online.pace_us > target_us or steps is None:
            return online.pace_us > target_us
        held_tokens = ledger.context_tokens + ledger.foreign_tokens
        return steps.decode_us(ledger.decodes, held_tokens) > self.step_share * target_us

    def over(self, ledger: Ledger, leaving: Leaving, victims: Victims) -> Victims:
        online = ledger.online
        if not online.count:
            return ()
        target_us = online.tightest_us(self.tpot_us)
        ranked = self._ranked(victims, longest=self.by_bottleneck and _is_bound_by_memory(ledger))
        if online.pace_us > target_us and not leaving.jobs:
            return ranked[:1]
        if ledger.steps is None:
            return ()
        count = ledger.decodes - leaving.jobs
        context = ledger.context_tokens + ledger.foreign_tokens - leaving.context_tokens
        chosen = []
        for victim in ranked:
            if ledger.steps.decode_us(count, context) <= self.step_share * target_us:
                break
            chosen.append(victim)
            count, context = count - 1, context - victim.context_tokens
        return chosen

    def may_pull(self, strict: Ledger, relaxed: Ledger) -> bool:
        """Whether a job of no length at all would step faster there."""
        if not self.pulls or strict.steps is None or relaxed.steps is None:
            return False
        there_us = strict.steps.decode_us(strict.decodes + 1, strict.context_tokens)
        return there_us < relaxed.steps.decode_us(relaxed.decodes, relaxed.context_tokens)

    def pull(self, strict: Ledger, relaxed: Ledger, victims: Victims) -> Victim | None:
        """The one whose length fills the strict server best, if what its steps are shorter there
        for the rest of its answer is more than its prompt costs again."""
        if strict.steps is None or relaxed.steps is None:
            return None
        fit = [v for v in victims if self._may_move(v)]
        if not fit:
            return None
        target_us = strict.online.tightest_us(self.tpot_us)
        wanted = preferred_length(
            strict.steps.cost,
            strict.decodes,
            strict.context_tokens,
            saturation=strict.steps.saturation,
            step_s=target_us / strict.steps.decode_factor * 1e-6,
            free_tokens=max(0, strict.kv_tokens - strict.reserved_tokens),
        )
        best = min(fit, key=lambda v: (abs(v.context_tokens - wanted), v.job_id))
        there_us = strict.steps.decode_us(
            strict.decodes + 1, strict.context_tokens + best.context_tokens
        )
        here_us = relaxed.steps.decode_us(relaxed.decodes, relaxed.context_tokens)
        again_us = best.context_tokens / relaxed.steps.prefill_tokens_per_us
        return best if best.left_tokens * (here_us - there_us) > again_us else None

    def _may_move(self, victim: Victim) -> bool:
        is_free = victim.preemptions < self.protect_after
        return victim.flows and is_free and victim.resume is Resume.EXACT

    def _ranked(self, victims: Iterable[Victim], *, longest: bool = False) -> list[Victim]:
        """Who loses least first: not yet protected, resumed without loss, not in transfer, new."""
        return sorted(
            victims,
            key=lambda v: (
                v.preemptions >= self.protect_after,
                v.flows and v.resume is not Resume.EXACT,
                not v.flows,
                -v.context_tokens if longest else -v.sent_us,
                v.job_id,
            ),
        )


def _is_bound_by_memory(ledger: Ledger) -> bool:
    """Attention reads more than half of what the step takes."""
    if ledger.steps is None:
        return False
    whole = ledger.steps.decode_us(ledger.decodes, ledger.context_tokens)
    return ledger.steps.decode_us(ledger.decodes, 0) < whole / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRule:
    """How much may be taken off at all: an abort storm is worse than what it is to cure."""

    per_request: int = 8
    """Victims of one online request."""
    per_s: float = 20.0
    burst: int = 40


class AbortBudget:
    """A bucket of aborts. Once it is empty it stays shut until it is half full again."""

    __slots__ = ("_rule", "_seen_us", "is_shut", "shut", "tokens")

    def __init__(self, rule: AbortRule) -> None:
        self._rule = rule
        self._seen_us = 0
        self.tokens: float = rule.burst
        self.is_shut = False
        self.shut = 0
        """How often it was emptied."""

    def adopt(self, rule: AbortRule) -> None:
        self._rule = rule
        self.tokens = min(self.tokens, rule.burst)

    def left(self, now_us: int) -> int:
        earned = (now_us - self._seen_us) * 1e-6 * self._rule.per_s
        self._seen_us = now_us
        self.tokens = min(self._rule.burst, self.tokens + earned)
        if self.is_shut and self.tokens * 2 >= self._rule.burst:
            self.is_shut = False
        return 0 if self.is_shut else int(self.tokens)

    def spend(self, aborts: int) -> None:
        self.tokens -= aborts
        if self.tokens < 1:
            self.is_shut = True
            self.shut += 1
