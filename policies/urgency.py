"""In which order waiting prompts are computed, decided anew for each chunk inside a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple


class Waiting(NamedTuple):
    """One prompt that is not computed to its end."""

    arrival_us: float
    """At the gateway, where its target counts from."""
    rest_tokens: int
    """Still to be computed."""
    prompt_tokens: int
    ttft_us: float
    """Its target; 0 when nobody waits for it."""
    is_online: bool = True
    max_tokens: int = 0


class Speed(NamedTuple):
    """What the server has shown so far."""

    now_us: float
    tokens_per_us: float


Key = tuple[float, ...]
PrefillOrder = Callable[[Sequence[Waiting], Speed], list[Key]]
"""A key for each prompt, of those in the order they came; the smallest goes first."""

RESERVE = 1.05
"""Rescue: work is taken to be so much more than predicted, because others will come."""
OLDEST_EVERY = {"salvage": 16, "shortest": 16, "rescue": 16}
"""Orders that could put a prompt off for ever give each so many-th pass to the oldest ones."""


def fcfs(waiting: Sequence[Waiting], speed: Speed) -> list[Key]:
    """First come, first served."""
    return [(row.arrival_us,) for row in waiting]


def edf(waiting: Sequence[Waiting], speed: Speed) -> list[Key]:
    """The first token that is due first; offline prompts after all others."""
    return [_after_online(row, (row.arrival_us + row.ttft_us,)) for row in waiting]


def shortest(waiting: Sequence[Waiting], speed: Speed) -> list[Key]:
    """The least left to compute; prompts are known, so this needs no oracle."""
    return [_after_online(row, (row.rest_tokens,)) for row in waiting]


def hrrn(waiting: Sequence[Waiting], speed: Speed) -> list[Key]:
    """The highest response ratio: time waited over time needed."""
    return [
        (-1 - (speed.now_us - row.arrival_us) * speed.tokens_per_us / max(1, row.rest_tokens),)
        for row in waiting
    ]


def kairos(waiting: Sequence[Waiting], speed: Speed) -> list[Key]:
    """Algorithms 1 and 2 of arXiv 2605.02329 as printed: slack in a first-come queue, over length.

    Late prompts have a negative slack, which a greater length brings nearer to zero: of them the
    longest goes first.
    """
    keys: list[Key] = []
    for row, slack in zip(waiting, fcfs_slacks(waiting, speed), strict=True):
        keys.append(_after_online(row, (-slack / max(1, row.prompt_tokens),)))
    return keys


def salvage(waiting: Sequence[Waiting], speed: Speed) -> list[Key]:
    """Short prompts that can still be on time, then late ones by what is left of them.

    Late is who would miss its target if it were alone.
    """
    keys: list[Key] = []
    for row in waiting:
        left_us = row.arrival_us + row.ttft_us - speed.now_us
        is_late = left_us < row.rest_tokens / speed.tokens_per_us
        keys.append(_after_online(row, (float(is_late), row.rest_tokens)))
    return keys


def rescue(waiting: Sequence[Waiting], speed: Speed) -> list[Key]:
    """As many as can be on time, first due first; then the others by what is left of them.

    The rule of Moore and Hodgson: in the order of deadlines, whenever one would be late, whoever of
    those before it has the most left is given up. It is optimal for those that are here.
    """
    first_due = sorted(
        (row.arrival_us + row.ttft_us, i) for i, row in enumerate(waiting) if row.ttft_us > 0
    )
    kept: list[tuple[int, int]] = []
    done_us, us_per_token = speed.now_us, RESERVE / speed.tokens_per_us
    for due_us, i in first_due:
        heappush(kept, (-waiting[i].rest_tokens, i))
        done_us += waiting[i].rest_tokens * us_per_token
        if done_us > due_us:
            done_us += heappop(kept)[0] * us_per_token
    on_time = {i for _, i in kept}
    return [
        _after_online(
            row,
            (0.0, row.arrival_us + row.ttft_us) if i in on_time else (1.0, row.rest_tokens),
        )
        for i, row in enumerate(waiting)
    ]


def fcfs_slacks(waiting: Sequence[Waiting], speed: Speed) -> list[float]:
    """What is left of each target, as a share of it, if all were computed as they came."""
    cursor_us, slacks = speed.now_us, []
    for row in waiting:
        cursor_us = max(cursor_us, row.arrival_us) + row.rest_tokens / speed.tokens_per_us
        ttft_us = row.ttft_us or 1.0
        slacks.append((ttft_us - (cursor_us - row.arrival_us)) / ttft_us)
    return slacks


def _after_online(row: Waiting, key: Key) -> Key:
    return (0.0 if row.is_online else 1.0, *key)


PREFILL_ORDER: dict[str, PrefillOrder] = {
    "fcfs": fcfs,
    "edf": edf,
    "shortest": shortest,
    "hrrn": hrrn,
    "kairos": kairos,
    "salvage": salvage,
    "rescue": rescue,
}
