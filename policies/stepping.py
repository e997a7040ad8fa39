"""Who takes a server's next decode step: what a packing chooses, behind valves it cannot close."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from policies.packing import PACKING, OnlinePaced, Packing, Running, StepUs

STEPPING: dict[str, Packing] = {
    "all": PACKING["all"],
    "online-first": PACKING["online-paced"],
    "slack": PACKING["most-kept"],
}
"""What a real engine offers. Steps are not what they were predicted to be, and whoever joins halts
all for some: the pace that was kept so far decides, not the prediction of one step."""

FREE_SHARE = 0.02
"""Places that a captured size leaves empty are filled while the step grows by no more than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Valves:
    """What holds whatever the packing says; somebody always steps, and so does whoever must."""

    most_parked_us: float = 2_000_000.0
    """Nobody who runs waits longer for a step, but for the steps of one choice."""
    hold_steps: int = 4
    """A choice is good for so many steps, unless somebody comes, goes, or has to step."""


def holding(packing: Packing, hold_steps: int) -> Packing:
    """As it has to choose where a choice is good for so many steps: what it lends in one of them
    it lends in each."""
    if not isinstance(packing, OnlinePaced):
        return packing
    return replace(packing, over_steps=max(packing.over_steps, 2 * hold_steps))


def elected(
    packing: Packing, running: Sequence[Running], step_us: StepUs, sizes: Sequence[int] = ()
) -> list[int]:
    """Indices in ascending order; `sizes` are those that CUDA graphs were captured for."""
    if sizes:
        step_us = padded(step_us, sizes)
    chosen = packing.choose(running, step_us)
    if len(chosen) == len(running):
        return chosen
    missing = {i for i, row in enumerate(running) if row.must_step}.difference(chosen)
    if missing:
        chosen = sorted(missing.union(chosen))
    if not chosen:
        chosen = [max(range(len(running)), key=lambda i: (running[i].skipped, -i))]
    return _filled_up(chosen, running, step_us, sizes) if sizes else chosen


def padded(step_us: StepUs, sizes: Sequence[int]) -> StepUs:
    """A replayed graph runs the next larger size that it was captured for."""

    def padded_us(count: int, context_tokens: int, longest_tokens: int) -> float:
        return step_us(captured(count, sizes), context_tokens, longest_tokens)

    return padded_us


def captured(count: int, sizes: Sequence[int]) -> int:
    """The size that a step of so many runs at; beyond the largest one there is no graph."""
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else count


def _filled_up(
    chosen: list[int], running: Sequence[Running], step_us: StepUs, sizes: Sequence[int]
) -> list[int]:
    room = captured(len(chosen), sizes) - len(chosen)
    if not room:
        return chosen
    contexts = [running[i].context_tokens for i in chosen]
    context, longest = sum(contexts), max(contexts)
    most_us = step_us(len(chosen), context, longest) * (1 + FREE_SHARE)
    taken = set(chosen)
    rest = [i for i in range(len(running)) if i not in taken]
    for index in sorted(rest, key=lambda i: -running[i].skipped)[:room]:
        tokens = running[index].context_tokens
        context, longest = context + tokens, max(longest, tokens)
        if step_us(len(taken) + 1, context, longest) > most_us:
            break
        taken.add(index)
    return sorted(taken)
