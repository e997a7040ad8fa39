"""Hears what the core hears, and keeps of it what the ratio is decided on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import islice

from policies.demand import Flow, Lengths
from policies.events import (
    Arrived,
    Event,
    Fail,
    Failed,
    Finished,
    FirstToken,
    Freed,
    Left,
    Preempted,
    Progress,
    Reject,
)
from policies.monitor import Monitor, Seen
from policies.types import Job, Kind

SPANS_S = (30.0, 60.0, 120.0, 300.0)
"""Lengths are taken from the shortest of these with enough arrivals in it."""
ENOUGH = 200


@dataclass(slots=True)
class _Open:
    """A job that has not ended."""

    job: Job
    first_us: int | None = None
    generated: int = 0
    before: int = 0
    """Tokens of earlier attempts that were kept."""


class Ingress:
    """A few dictionary entries a job; what has ended is only in the monitor's sums."""

    def __init__(self, now_us: int) -> None:
        self.monitor = Monitor(now_us, window_s=SPANS_S[-1])
        self._open: dict[str, _Open] = {}
        self._unanswered: dict[str, _Open] = {}
        """Online jobs without a first token, oldest first."""
        self._made: dict[Kind, deque[tuple[int, int, float]]] = {kind: deque() for kind in Kind}
        """Of each look: its time, the answers that had ended, the tokens that had been made."""
        self._ended: dict[Kind, int] = dict.fromkeys(Kind, 0)
        self._tokens: dict[Kind, int] = dict.fromkeys(Kind, 0)

    def hear(self, now_us: int, event: Event) -> None:
        match event:
            case Progress(tokens):
                opened = self._open
                for job_id, generated in tokens:
                    if (entry := opened.get(job_id)) is not None:
                        entry.generated = generated
            case Arrived(job):
                self._arrived(job, now_us)
            case FirstToken(job_id):
                self._first_token(job_id, now_us)
            case Finished(job_id, generated):
                self._finished(job_id, generated, now_us)
            case Failed(job_id) | Preempted(job_id):
                if (entry := self._open.get(job_id)) is not None:
                    entry.before += event.generated
                    entry.generated = 0
            case Left(job_id) | Freed(job_id):
                self._forget(job_id)
            case _:
                pass

    def decided(self, decision: Reject | Fail) -> None:
        self._forget(decision.job.id)

    def _arrived(self, job: Job, now_us: int) -> None:
        self.monitor.arrived(job.kind, job.prompt_tokens, job.cached_tokens, now_us)
        self._open[job.id] = entry = _Open(job)
        if job.kind is Kind.ONLINE:
            self._unanswered[job.id] = entry

    def _first_token(self, job_id: str, now_us: int) -> None:
        entry = self._open.get(job_id)
        if entry is None or entry.first_us is not None:
            return
        entry.first_us = now_us
        self._unanswered.pop(job_id, None)
        job = entry.job
        self.monitor.seen(job.kind, Seen.TTFT, now_us - job.arrival_us, now_us)

    def _finished(self, job_id: str, generated: int, now_us: int) -> None:
        if (entry := self._forget(job_id)) is None:
            return
        kind, tokens = entry.job.kind, entry.before + generated
        self.monitor.seen(kind, Seen.ANSWER, tokens, now_us)
        self.monitor.seen(kind, Seen.STAY, now_us - entry.job.arrival_us, now_us)
        if entry.first_us is not None and tokens > 1:
            each_us = (now_us - entry.first_us) / (tokens - 1)
            self.monitor.seen(kind, Seen.TPOT, each_us, now_us)
        self._ended[kind] += 1
        self._tokens[kind] += tokens

    def _forget(self, job_id: str) -> _Open | None:
        self._unanswered.pop(job_id, None)
        return self._open.pop(job_id, None)

    # What is asked of it.

    @property
    def waiting(self) -> int:
        return len(self._unanswered)

    @property
    def waiting_tokens(self) -> int:
        entries = self._unanswered.values()
        return sum(it.job.prompt_tokens - it.job.cached_tokens for it in entries)

    def oldest_wait_s(self, now_us: int, lost: int) -> float:
        """Of the oldest but so many: each server may hold one that is lost and no queue."""
        first = next(islice(self._unanswered.values(), lost, None), None)
        return 0.0 if first is None else (now_us - first.job.arrival_us) / 1e6

    def mean(self, what: Seen, now_us: int, span_s: float = 60.0) -> float | None:
        return self.monitor.sum(Kind.ONLINE, what, round(span_s * 1e6), now_us).mean

    def look(self, kind: Kind, interval_s: float, now_us: int) -> Flow:
        """The flow of the interval that ends now; to be called once for each."""
        span_us = round(self._span_s(kind, now_us) * 1e6)
        interval_us = round(interval_s * 1e6)
        found = self.monitor.flow(kind, now_us, rate_us=interval_us, lengths_us=span_us)
        live = [it for it in self._open.values() if it.job.kind is kind]
        made = self._tokens[kind] + sum(it.before + it.generated for it in live)
        looks = self._made[kind]
        looks.append((now_us, self._ended[kind], made))
        while len(looks) > 2 and looks[1][0] <= now_us - span_us:
            looks.popleft()
        return replace(found, answer=self._answers(kind, found.answer, live))

    def _span_s(self, kind: Kind, now_us: int) -> float:
        for span_s in SPANS_S:
            if self.monitor.sum(kind, Seen.PROMPT, round(span_s * 1e6), now_us).count >= ENOUGH:
                return span_s
        return SPANS_S[-1]

    def _answers(self, kind: Kind, ended: Lengths, live: list[_Open]) -> Lengths:
        """By what was made while so many answers ended: those that ended are the short ones.

        Before any has ended they are taken to be half way on average.
        """
        first, last = self._made[kind][0], self._made[kind][-1]
        count, made = last[1] - first[1], last[2] - first[2]
        if count and made > 0:
            mean = max(1.0, made / count)
        elif begun := [so_far for it in live if (so_far := it.before + it.generated)]:
            mean = max(1.0, 2.0 * sum(begun) / len(begun))
        else:
            return ended
        factor = mean / ended.mean if ended.mean else 1.0
        return Lengths(mean, ended.variance * factor * factor)
