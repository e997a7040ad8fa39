"""What a server has done, as its /v1/loads counts it: prefill tokens and time, decode moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from policies.calibration import DecodeMoments
from policies.steps import Counters

_MOMENTS = 6


def counters_of(ranks: Sequence[Mapping[str, Any]]) -> Counters | None:
    """All ranks together; None where a server does not count its work."""
    if not ranks or any("total_prefill_busy_us" not in rank for rank in ranks):
        return None
    sums = [0.0] * _MOMENTS
    for rank in ranks:
        moments = rank.get("decode_moments")  # null before the first step
        if isinstance(moments, list) and len(moments) >= _MOMENTS:
            sums = [a + float(b) for a, b in zip(sums, moments, strict=False)]
    steps, batch, time_us, batch_squared, batch_time_us, generated = sums
    return Counters(
        prefill_tokens=sum(int(rank.get("total_prefill_uncached_tokens") or 0) for rank in ranks),
        prefill_busy_us=sum(int(rank["total_prefill_busy_us"] or 0) for rank in ranks),
        decoded=DecodeMoments(
            steps=steps,
            batch=batch,
            time_us=time_us,
            batch_squared=batch_squared,
            batch_time_us=batch_time_us,
            generated=generated,
        ),
    )
