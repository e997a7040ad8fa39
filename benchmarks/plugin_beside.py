"""(a) Eight online and eight offline requests on one decode server: what a target costs them."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from benchmarks.plugin_found import HOLD_STEPS, MOST_PARKED_S, Effort, Found, error_of, say
from benchmarks.plugin_model import Row, played
from benchmarks.plugin_outside import Outside
from benchmarks.plugin_site import Site, Stream
from benchmarks.report import Check, Report, Spread
from policies.step_line import SeenStep, fitted

ONLINE, OFFLINE = 8, 8
ONLINE_PROMPT, OFFLINE_PROMPT = 600, 3000
ONLINE_TOKENS, OFFLINE_TOKENS = 150, 4000
SHARES = (0.35, 0.6, 0.85)
"""Targets, between the step of the online requests alone and that of all."""


@dataclass(slots=True)
class Colocation:
    site: Site
    effort: Effort
    found: Found
    steps: list[SeenStep] = field(default_factory=list)
    online: list[list[int]] = field(default_factory=list)
    offline: list[list[int]] = field(default_factory=list)
    """Prompts."""
    targets: dict[float, float] = field(default_factory=dict)
    """Share -> milliseconds."""

    @property
    def online_row(self) -> Row:
        of = self.effort.of
        return Row(prompt_tokens=of(ONLINE_PROMPT), tokens=ONLINE_TOKENS)

    @property
    def offline_row(self) -> Row:
        of = self.effort.of
        return Row(prompt_tokens=of(OFFLINE_PROMPT), tokens=2 * ONLINE_TOKENS, online=False)

    async def measure(self) -> None:
        self.online = [self.site.prompt(self.online_row.prompt_tokens) for _ in range(ONLINE)]
        self.offline = [self.site.prompt(self.offline_row.prompt_tokens) for _ in range(OFFLINE)]
        async with self.site.listening() as steps:
            await self._beside("", "all", OFFLINE)  # prompts are in the cache from here on
            for number in range(self.effort.runs):
                say(f"(a) without selection, run {number + 1} of {self.effort.runs}")
                await self._beside("alone", "all", 0)
                await self._beside("everyone", "all", OFFLINE)
                await self._beside("priority", "all", OFFLINE, priority=100)
            await self._at_targets()
            self.steps += steps

    async def _at_targets(self) -> None:
        alone, everyone = self.found.median("alone online"), self.found.median("everyone online")
        for share in SHARES[1:2] if self.effort.quick else SHARES:
            self.targets[share] = alone + share * (everyone - alone)
        for number in range(self.effort.runs):
            say(f"(a) at {len(self.targets)} targets, run {number + 1} of {self.effort.runs}")
            for share, target_ms in self.targets.items():
                await self._outside(f"abort {share}", target_ms, int(OFFLINE * share))
                name = f"select {share}"
                await self._beside(name, "online-first", OFFLINE, target_ms)
                of_target = self.found.values[f"{name} online"][-1] / target_ms
                self.found.add(f"{name} of target", of_target)

    async def _beside(
        self, name: str, mode: str, offline: int, target_ms: float = 0.0, **more: Any
    ) -> None:
        site = self.site
        await site.set(mode, hold_steps=HOLD_STEPS, most_parked_us=MOST_PARKED_S * 1e6)
        lowest = {"priority": 0} if more else {}
        others = [
            site.send(prompt, OFFLINE_TOKENS, offline=True, **lowest)
            for prompt in self.offline[:offline]
        ]
        await site.begun(others)
        streams = self._come(target_ms, **more)
        await site.over(streams)
        self._note(name, streams, others)
        await site.stop(others)

    async def _outside(self, name: str, target_ms: float, most: int) -> None:
        await self.site.set("all")
        outside = Outside(self.site, self.offline, OFFLINE_TOKENS)
        await self.site.begun([outside.admit(work) for work in outside.works])
        streams = self._come()
        await outside.cut(most)
        holding = asyncio.create_task(outside.hold(streams, target_ms))
        await self.site.over(streams)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        self._note(name, streams, outside.works)
        self.found.add(f"{name} aborts", outside.aborts)
        await outside.stop()

    def _come(self, target_ms: float = 0.0, **more: Any) -> list[Stream]:
        send, tokens = self.site.send, self.online_row.tokens
        return [send(ids, tokens, tpot_ms=target_ms, **more) for ids in self.online]

    def _note(self, name: str, streams: Sequence[Stream], others: Sequence[Any]) -> None:
        if not name:
            return
        from_s = max(stream.events[0][0] for stream in streams)
        until_s = min(stream.events[-1][0] for stream in streams)
        made = sum(other.tokens_between(from_s, until_s) for other in others)
        online_ms = statistics.fmean(it.tpot_ms for it in streams)
        say(f"    {name}: {online_ms:.1f} ms, {made / (until_s - from_s):.0f} offline tokens/s")
        self.found.add(f"{name} online", online_ms)
        self.found.add(f"{name} offline", made / (until_s - from_s))

    def tell(self, report: Report) -> None:
        for share in self.targets:
            ratio = self.found.median(f"select {share} of target")
            name = f"(a) online TPOT off its target, target at {share:.0%}"
            report.checks.append(Check(name=name, value=abs(ratio - 1), target=0.05, unit=""))
        report.tables += [self._table(), self._predicted(report)]

    def _table(self) -> Table:
        table = Table(title="8 online and 8 offline, one decode server", title_justify="left")
        for column in ("how", "target ms", "online TPOT ms", "offline tok/s", "aborts"):
            table.add_column(column, justify="left" if column == "how" else "right")
        rows = [
            ("online alone", "", "alone"),
            ("everyone steps", "", "everyone"),
            ("--enable-priority-scheduling", "", "priority"),
        ]
        for share, target_ms in self.targets.items():
            told = f"{target_ms:.1f}"
            rows.append(("admission and abort from outside", told, f"abort {share}"))
            rows.append(("selection", told, f"select {share}"))
        values = self.found.values
        for how, told, name in rows:
            figures = [str(Spread.of(values[f"{name} {what}"])) for what in ("online", "offline")]
            aborts = values.get(f"{name} aborts")
            table.add_row(how, told, *figures, str(Spread.of(aborts)) if aborts else "")
        return table

    def _predicted(self, report: Report) -> Table:
        """What the patched simulator makes of the same requests with the measured line of steps."""
        table = Table(title="(a) simulated with the measured steps", title_justify="left")
        for column in ("case", "online TPOT", "real", "error", "offline tok/s", "real", "error"):
            table.add_column(column, justify="left" if column == "case" else "right")
        line = fitted(self.steps)
        assert line is not None
        report.notes.append(
            f"(a) measured step: {line.base_us:.0f} us + {line.request_us:.0f} us a request + "
            f"{line.token_us * 1000:.1f} us for 1,000 tokens of context ({len(self.steps)} steps)"
        )
        cases = [("everyone", "all", 0.0)]
        cases += [(f"select {share}", "online-first", ms) for share, ms in self.targets.items()]
        for name, mode, target_ms in cases:
            rows = [replace(self.online_row, tpot_ms=target_ms)] * ONLINE
            rows += [self.offline_row] * OFFLINE
            told = played(line, rows, mode, HOLD_STEPS)
            until_s = min(it.times_s[-1] for it in told[:ONLINE])
            from_s = max(it.times_s[0] for it in told[:ONLINE])
            made = sum(sum(from_s < at_s <= until_s for at_s in it.times_s) for it in told[ONLINE:])
            cells: list[str] = []
            for value, what in (
                (statistics.fmean(it.tpot_ms for it in told[:ONLINE]), "online"),
                (made / (until_s - from_s), "offline"),
            ):
                real = self.found.median(f"{name} {what}")
                cells += [f"{value:.1f}", f"{real:.1f}", error_of(value, real)]
            table.add_row(name, *cells)
        return table
