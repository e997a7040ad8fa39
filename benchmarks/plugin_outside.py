"""Admission and abort from outside: what a gateway can do for a target on stock SGLang.

It hears what clients hear, takes offline requests back by aborting them, and sends them again with
what they had answered. Nothing that was answered is lost; what it costs to compute again is paid.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.plugin_site import Site, Stream

LOOK_S = 0.05
SETTLE_S = 0.25
"""After a change, before the next: a step more or less shows in the pace only then."""
ROOM = 0.97
"""Of the target: below it there is room for one more."""


@dataclass(slots=True)
class Work:
    """One offline request, over all the times that it is sent."""

    prompt: list[int]
    tokens: int
    sent: list[Stream] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    running: bool = False

    def tokens_between(self, from_s: float, until_s: float) -> int:
        return sum(stream.tokens_between(from_s, until_s) for stream in self.sent)


class Outside:
    """Holds the mean pace of the online streams at the target, one offline request at a time."""

    def __init__(self, site: Site, prompts: Sequence[list[int]], tokens: int) -> None:
        self._site = site
        self.works = [Work(prompt, tokens) for prompt in prompts]
        self.aborts = 0

    def admit(self, work: Work) -> Stream:
        work.running = True
        stream = self._site.send(
            work.prompt + work.answer, work.tokens - len(work.answer), offline=True
        )
        work.sent.append(stream)
        return stream

    async def take_back(self, work: Work) -> None:
        work.running = False
        self.aborts += 1
        stream = work.sent[-1]
        await self._site.abort(stream)
        work.answer += stream.ids

    async def cut(self, most: int) -> None:
        """At once, as online requests come: only so many fit beside them by the measured steps."""
        running = [work for work in self.works if work.running]
        async with asyncio.TaskGroup() as group:
            for work in running[most:]:
                group.create_task(self.take_back(work))

    async def hold(self, online: Sequence[Stream], target_ms: float) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        changed_s = loop.time()
        while True:
            await asyncio.sleep(LOOK_S)
            paces = [stream.tpot_ms for stream in online if len(stream.events) > 2]
            if not paces or loop.time() < changed_s + SETTLE_S:
                continue
            pace_ms = statistics.fmean(paces)
            running = [work for work in self.works if work.running]
            waiting = [work for work in self.works if not work.running]
            if pace_ms > target_ms and running:
                await self.take_back(running[-1])
                changed_s = loop.time()
            elif pace_ms < ROOM * target_ms and waiting:
                self.admit(waiting[0])
                changed_s = loop.time()

    async def stop(self) -> None:
        await self._site.stop([stream for work in self.works for stream in work.sent])
