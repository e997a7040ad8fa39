"""How far a batch has come and when it will be done: any gateway can tell, from its counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

import orjson

from gateway.batch.objects import Batch, Status

KEY: Final = "slackwater"
"""In a batch's metadata, whose values are texts: a JSON object as one."""
_LEAST_SPAN_US: Final = 1_000_000
"""Rates of less time than this would jump about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    queued: int
    running: int
    """Held by a gateway: at a server, or about to be."""
    completed: int
    failed: int
    rows_per_s: float
    tokens_per_s: float
    """Generated tokens of rows that have finished, over the last minute or so."""
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    wasted_tokens: int
    """Generated in vain: the row was run again, or nobody wanted it any more."""
    finish_at: int | None
    """Unix time; None where nothing has finished lately, or all has."""

    def as_text(self) -> str:
        return orjson.dumps(asdict(self)).decode()


def progress_of(batch: Batch, now_us: int) -> Progress:
    counts, usage = batch.counts, batch.usage
    rows_per_s = tokens_per_s = 0.0
    finish_at = None
    if batch.status is Status.IN_PROGRESS and batch.recent_us:
        span_s = max(now_us - batch.recent_us, _LEAST_SPAN_US) / 1e6
        rows_per_s = batch.recent_rows / span_s
        tokens_per_s = batch.recent_tokens / span_s
        if batch.recent_rows:
            finish_at = round(now_us / 1e6 + counts.unfinished / rows_per_s)
    return Progress(
        queued=max(0, batch.queued),
        running=batch.claimed,
        completed=counts.completed,
        failed=counts.failed,
        rows_per_s=round(rows_per_s, 2),
        tokens_per_s=round(tokens_per_s, 1),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        generated_tokens=usage.generated_tokens,
        wasted_tokens=usage.wasted_tokens,
        finish_at=finish_at,
    )
