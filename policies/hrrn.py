"""Highest response ratio next, and how its head is found without looking at the whole queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from policies.moving import TURN_JOBS
from policies.order import NO_OUTLOOK, Key, Order, Outlook, remaining_tokens
from policies.queue import Item, KeyedHeap
from policies.types import Job

STEPS_AN_OCTAVE: Final = 4
"""Lengths that count as alike differ by less than a quarter."""
_OCTAVE_BITS: Final = STEPS_AN_OCTAVE.bit_length() - 1
_SCALE: Final = 1_000_000


def waited_share(waited_us: int, own_tokens: int) -> int:
    """Waiting time for each token of the prompt, in an integer's parts."""
    return _SCALE * max(0, waited_us) // own_tokens


def length_step(own_tokens: int) -> int:
    """Within one step, no length is a quarter more than another."""
    shift = own_tokens.bit_length() - 1 - _OCTAVE_BITS
    return own_tokens if shift <= 0 else (shift << _OCTAVE_BITS) + (own_tokens >> shift)


class ByLength:
    """Jobs of like length in the order of their arrival: only the oldest of each are compared.

    Of equal lengths the oldest has the largest ratio at any time. Of lengths within a quarter,
    whoever is older than another has at least four fifths of its ratio; so has the one chosen here,
    of the largest ratio in the queue. There are four steps for each doubling of the length: 72
    cover a prompt of 256 K tokens.
    """

    __slots__ = ("_step_of", "_steps")

    def __init__(self) -> None:
        self._steps: dict[int, KeyedHeap[tuple[int, int]]] = {}
        self._step_of: dict[str, int] = {}

    def add(self, job: Job) -> None:
        self.discard(job)
        own_tokens = remaining_tokens(job)
        step = self._step_of[job.id] = length_step(own_tokens)
        if (jobs := self._steps.get(step)) is None:
            jobs = self._steps[step] = KeyedHeap()
        jobs.put(job.id, (job.arrival_us, own_tokens))

    def discard(self, job: Job) -> None:
        if (step := self._step_of.pop(job.id, None)) is not None:
            jobs = self._steps[step]
            jobs.discard(job.id)
            if not jobs.entries:
                del self._steps[step]

    def key(self, job: Job, order: Order, outlook: Outlook) -> Key:
        """Its place among all lengths is not kept, but found at each look."""
        return (job.arrival_us,)

    def turn(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> None:
        """No key is kept that could have grown old."""

    def first(self, heap: KeyedHeap[Key], order: Order, outlook: Outlook) -> str | None:
        """The largest ratio now, among the oldest of each step or, if they are few, among all."""
        now_us, best, first = outlook.now_us, -1, (0, "")
        for arrival_us, own_tokens, job_id in self._compared():
            share = waited_share(now_us - arrival_us, own_tokens)
            if share > best or (share == best and (arrival_us, job_id) < first):
                best, first = share, (arrival_us, job_id)
        return first[1] if best >= 0 else None

    def _compared(self) -> list[Item]:
        if len(self._step_of) <= TURN_JOBS:
            return [item for jobs in self._steps.values() for item in jobs.entries.values()]
        return [jobs.first() for jobs in self._steps.values()]


@dataclass(frozen=True, slots=True)
class Hrrn:
    """Highest response ratio next: the longest wait for each token of the prompt goes first.

    The ratio is (wait + work) / work. Where work is tokens at one rate, waiting time over tokens
    puts jobs into the same order at any rate.
    """

    moves: ClassVar[type[ByLength]] = ByLength

    def key(self, job: Job, outlook: Outlook = NO_OUTLOOK) -> Key:
        waited_us = outlook.now_us - job.arrival_us
        return (-waited_share(waited_us, remaining_tokens(job)), job.arrival_us)
