"""SGLang's --schedule-policy: in which order the waiting queue is taken in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from backends.engine.machine import Machine
from backends.engine.request import Resident

Key = tuple[float, ...]
MATCHED_AT_MOST = 128
"""hrrn looks prefixes up, and gives up sorting, where more prompts wait."""


def fcfs(machine: Machine, resident: Resident) -> Key:
    return (resident.serial,)


def lof(machine: Machine, resident: Resident) -> Key:
    """Longest output first, by what it may have at most."""
    return (-resident.budget, resident.serial)


def shortest_prefill_first(machine: Machine, resident: Resident) -> Key:
    return (max(1, uncached(machine, resident)), resident.serial)


def hrrn(machine: Machine, resident: Resident) -> Key:
    """Tokens computed while it waited, over tokens that it needs."""
    rest = uncached(machine, resident)
    waited = machine.counters.prefill_uncached_tokens - resident.entered_tokens
    return (-waited / rest if rest > 0 else float("-inf"), resident.serial)


SCHEDULE: dict[str, Callable[[Machine, Resident], Key]] = {
    "fcfs": fcfs,
    "lof": lof,
    "shortest-prefill-first": shortest_prefill_first,
    "hrrn": hrrn,
}


def first_of(machine: Machine, waiting: Mapping[int, Resident]) -> Resident:
    key = SCHEDULE[machine.config.schedule_policy]
    if key is fcfs or (key is hrrn and len(waiting) > MATCHED_AT_MOST):
        return next(iter(waiting.values()))
    return min(waiting.values(), key=lambda it: key(machine, it))


def room_for_shorter(
    machine: Machine, chunked: Resident, waiting: Iterable[Resident], budget: int
) -> int:
    """What the chunked prompt may take where shorter ones that wait are given room first."""
    page = machine.kv.page
    if machine.config.schedule_policy != "shortest-prefill-first" or budget < 2 * page:
        return budget
    rest, reserved = chunked.fill_tokens - chunked.prefilled, 0
    for work in sorted(max(1, uncached(machine, it)) for it in waiting):
        charge = machine.kv.pages(work)
        if work >= rest or reserved + charge > budget - page:
            break
        reserved += charge
    return (budget - reserved) // page * page


def uncached(machine: Machine, resident: Resident) -> int:
    prompt, kv = resident.full_prompt(), machine.kv
    return resident.fill_tokens - kv.match(resident.request.space, prompt, prompt.tokens - 1)[1]
