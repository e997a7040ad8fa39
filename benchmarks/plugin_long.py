"""(c) Online prompts behind a long offline one that is being computed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from benchmarks.plugin_found import Effort, Found, say
from benchmarks.plugin_site import CHUNK_TOKENS, Site, Stream
from benchmarks.report import Check, Report

LONG_PROMPT, URGENT_PROMPT = 12_000, 200
COME_S = (0.4, 0.25)
"""After the long one, and after the first."""
CASES = {"stock": 0, "displaced": 1, "undisturbed": None}


@dataclass(slots=True)
class Displacement:
    site: Site
    effort: Effort
    found: Found

    @property
    def tokens(self) -> int:
        return self.effort.of(LONG_PROMPT)

    async def measure(self) -> None:
        for number in range(self.effort.runs):
            say(f"(c) run {number + 1} of {self.effort.runs}")
            for name, displace in CASES.items():
                await self._once(name, displace)

    async def _once(self, name: str, displace: int | None) -> None:
        site = self.site
        await site.set("all", displace=displace or 0)
        long = site.send(site.prompt(self.tokens), 2, offline=True)
        urgent: list[Stream] = []
        for wait_s in COME_S if displace is not None else ():
            await asyncio.sleep(wait_s)
            urgent.append(site.send(site.prompt(URGENT_PROMPT), 2))
        await site.over([long, *urgent])
        self.found.add(f"{name} long", long.ttft_ms)
        for stream in urgent:
            self.found.add(f"{name} urgent", stream.ttft_ms)

    def tell(self, report: Report) -> None:
        undisturbed_ms = self.found.median("undisturbed long")
        chunk_ms = undisturbed_ms / (self.tokens / CHUNK_TOKENS)
        own = self.found.median("displaced long") / undisturbed_ms
        waited = self.found.median("displaced urgent") / chunk_ms
        report.notes.append(
            f"(c) a chunk of {CHUNK_TOKENS} tokens takes {chunk_ms:.0f} ms on average"
        )
        name = "(c) online TTFT in chunks, displacing"
        report.checks += [
            Check(name=name, value=waited, target=2, unit="chunks"),
            Check(
                name="(c) the long prompt's own TTFT", value=own, target=1.10, unit="of undisturbed"
            ),
        ]
