"""What the plug-in in the engine gives and costs, on real SGLang on this machine's CPU.

python -m benchmarks.plugin [--json] [--quick] [--runs 5] [--model tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from backends.fleet.spec import FleetError
from benchmarks.plugin_model import Row, played
from benchmarks.plugin_overhead import resting_us
from benchmarks.plugin_site import CHUNK_TOKENS, Site, Stream, standing
from benchmarks.report import Check, Goal, Report, Spread, add_report_options
from policies.step_line import SeenStep, fitted

ONLINE, OFFLINE = 8, 8
ONLINE_PROMPT, OFFLINE_PROMPT = 600, 3000
ONLINE_TOKENS, OFFLINE_TOKENS = 150, 4000
SHARES = (0.35, 0.6, 0.85)
"""Targets, between the step of the online requests alone and that of all."""
LOOSE = (4, 8, 12)
TIGHT = 6
MIXED_TOKENS = 120
TIGHT_SHARE, LOOSE_SHARE = 0.85, 2.0
"""Of what everybody's step takes on stock SGLang at that load."""
LONG_PROMPT, URGENT_PROMPT = 12_000, 200
HOLD_STEPS = 4
MOST_PARKED_S = 2.0


@dataclass(slots=True)
class Beside:
    """Online and offline requests on one decode server."""

    online_ms: float
    offline_per_s: float


@dataclass(slots=True)
class Found:
    """Repetitions of each figure by its name."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])


@dataclass(slots=True)
class Course:
    site: Site
    runs: int
    shares: tuple[float, ...] = SHARES
    loads: tuple[int, ...] = LOOSE
    tokens: int = MIXED_TOKENS
    found: Found = field(default_factory=Found)
    steps: list[SeenStep] = field(default_factory=list)
    online: list[list[int]] = field(default_factory=list)
    offline: list[list[int]] = field(default_factory=list)
    tight: list[list[int]] = field(default_factory=list)
    loose: list[list[int]] = field(default_factory=list)
    """Prompts."""

    def say(self, what: str) -> None:
        """To whoever waits."""
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}\n")

    # (a) Online requests beside offline ones.

    async def beside(self, mode: str, target_ms: float, offline: int, **more: Any) -> Beside:
        site = self.site
        await site.set(mode, hold_steps=HOLD_STEPS, most_parked_us=MOST_PARKED_S * 1e6)
        others = [
            site.send(prompt, OFFLINE_TOKENS, offline=True, **({"priority": 0} if more else {}))
            for prompt in self.offline[:offline]
        ]
        await site.begun(others)
        streams = [
            site.send(prompt, ONLINE_TOKENS, tpot_ms=target_ms, **more) for prompt in self.online
        ]
        await site.over(streams)
        from_s = max(stream.events[0][0] for stream in streams)
        until_s = min(stream.events[-1][0] for stream in streams)
        made = sum(stream.tokens_between(from_s, until_s) for stream in others)
        await site.stop(others)
        online_ms = statistics.fmean(stream.tpot_ms for stream in streams)
        return Beside(online_ms, made / (until_s - from_s))

    async def colocation(self) -> list[float]:
        """The three targets, in milliseconds."""
        self.online = [self.site.prompt(ONLINE_PROMPT) for _ in range(ONLINE)]
        self.offline = [self.site.prompt(OFFLINE_PROMPT) for _ in range(OFFLINE)]
        await self.beside("all", 0.0, OFFLINE)  # prompts are in the cache from here on
        for number in range(self.runs):
            self.say(f"(a) without selection, run {number + 1} of {self.runs}")
            await self._noted("alone", "all", 0.0, 0)
            await self._noted("everyone", "all", 0.0, OFFLINE)
            await self._noted("priority", "all", 0.0, OFFLINE, priority=100)
        alone, everyone = self.found.median("alone online"), self.found.median("everyone online")
        targets = [alone + share * (everyone - alone) for share in self.shares]
        for number in range(self.runs):
            self.say(f"(a) at {len(targets)} targets, run {number + 1} of {self.runs}")
            for share, target_ms in zip(self.shares, targets, strict=True):
                kept = int(OFFLINE * share)  # as a step grows with each offline request
                await self._noted(f"abort {share}", "all", 0.0, kept)
                await self._noted(f"select {share}", "online-first", target_ms, OFFLINE)
                self.found.add(
                    f"select {share} of target",
                    self.found.values[f"select {share} online"][-1] / target_ms,
                )
        return targets

    async def _noted(
        self, name: str, mode: str, target_ms: float, offline: int, **more: Any
    ) -> None:
        got = await self.beside(mode, target_ms, offline, **more)
        self.found.add(f"{name} online", got.online_ms)
        self.found.add(f"{name} offline", got.offline_per_s)

    # (b) Tight and loose targets.

    async def mixed(self, mode: str, loose: int, tight_ms: float, loose_ms: float) -> list[Stream]:
        site = self.site
        await site.set(mode, hold_steps=HOLD_STEPS, most_parked_us=MOST_PARKED_S * 1e6)
        long = [site.send(prompt, self.tokens, tpot_ms=loose_ms) for prompt in self.loose[:loose]]
        short = [site.send(prompt, self.tokens, tpot_ms=tight_ms) for prompt in self.tight]
        await site.over([*short, *long])
        return [*short, *long]

    async def kairos(self) -> None:
        self.tight = [self.site.prompt(200 + 60 * i) for i in range(TIGHT)]
        self.loose = [self.site.prompt(2500 + 100 * i) for i in range(max(self.loads))]
        await self.mixed("all", max(self.loads), 1e3, 1e3)
        for loose in self.loads:
            streams = await self.mixed("all", loose, 1e3, 1e3)
            step_ms = statistics.median(stream.tpot_ms for stream in streams[:TIGHT])
            tight_ms, loose_ms = TIGHT_SHARE * step_ms, LOOSE_SHARE * step_ms
            for number in range(self.runs):
                self.say(f"(b) {loose} loose ones, run {number + 1} of {self.runs}")
                for mode in ("all", "slack"):
                    streams = await self.mixed(mode, loose, tight_ms, loose_ms)
                    self._note_mixed(f"{loose} loose {mode}", streams, tight_ms, loose_ms)

    def _note_mixed(
        self, name: str, streams: Sequence[Stream], tight_ms: float, loose_ms: float
    ) -> None:
        targets = [tight_ms] * TIGHT + [loose_ms] * (len(streams) - TIGHT)
        met = sum(it.tpot_ms <= target for it, target in zip(streams, targets, strict=True))
        began_s = min(stream.events[0][0] for stream in streams)
        ended_s = max(stream.events[-1][0] for stream in streams)
        made = sum(stream.events[-1][1] for stream in streams)
        self.found.add(f"{name} met", met / len(streams))
        self.found.add(f"{name} per s", made / (ended_s - began_s))
        self.found.add(f"{name} gap", max(stream.longest_gap_s for stream in streams))

    # (c) A long prompt in the way.

    async def displacement(self) -> None:
        site = self.site
        for displace in (0, 1, None):
            for number in range(self.runs):
                self.say(f"(c) displace {displace}, run {number + 1} of {self.runs}")
                await site.set("all", displace=displace or 0)
                long = site.send(site.prompt(LONG_PROMPT), 2, offline=True)
                urgent: list[Stream] = []
                if displace is not None:
                    await asyncio.sleep(0.4)
                    urgent.append(site.send(site.prompt(URGENT_PROMPT), 2))
                    await asyncio.sleep(0.25)
                    urgent.append(site.send(site.prompt(URGENT_PROMPT), 2))
                await site.over([long, *urgent])
                name = {0: "stock", 1: "displaced", None: "undisturbed"}[displace]
                self.found.add(f"{name} long", long.ttft_ms)
                for stream in urgent:
                    self.found.add(f"{name} urgent", stream.ttft_ms)


async def measured(
    model: str, runs: int, *, quick: bool
) -> tuple[Course, list[float], dict[str, Any]]:
    async with standing(model, seed=11) as site:
        course = Course(site, runs)
        if quick:
            course = Course(site, 1, shares=SHARES[1:2], loads=LOOSE[1:2], tokens=MIXED_TOKENS // 2)
        async with site.listening() as steps:
            targets = await course.colocation()
            await course.kairos()
            course.steps += steps
        state = await site.state()
        await course.displacement()
        return course, targets, state


def predicted(course: Course, targets: Sequence[float], report: Report) -> None:
    """What the patched simulator makes of the same requests with the measured line of steps."""
    line = fitted(course.steps)
    if line is None:
        report.notes.append("no steps were reported: nothing to predict from")
        return
    report.notes.append(
        f"measured step: {line.base_us:.0f} us + {line.request_us:.0f} us a request + "
        f"{line.token_us * 1000:.1f} us for 1,000 tokens of context ({len(course.steps)} steps)"
    )
    online = Row(prompt_tokens=ONLINE_PROMPT, tokens=ONLINE_TOKENS)
    offline = Row(prompt_tokens=OFFLINE_PROMPT, tokens=2 * ONLINE_TOKENS, online=False)
    cases = [("everyone", "all", 0.0)]
    cases += [
        (f"select {share}", "online-first", target)
        for share, target in zip(course.shares, targets, strict=True)
    ]
    table = Table(title="Simulated with the measured steps", title_justify="left")
    for column in ("case", "online TPOT", "real", "error", "offline tok/s", "real", "error"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, mode, target_ms in cases:
        rows = [replace(online, tpot_ms=target_ms)] * ONLINE + [offline] * OFFLINE
        told = played(line, rows, mode, HOLD_STEPS)
        until_s = min(it.times_s[-1] for it in told[:ONLINE])
        from_s = max(it.times_s[0] for it in told[:ONLINE])
        made = sum(sum(from_s < at_s <= until_s for at_s in it.times_s) for it in told[ONLINE:])
        pairs = (
            (statistics.fmean(it.tpot_ms for it in told[:ONLINE]), f"{name} online"),
            (made / (until_s - from_s), f"{name} offline"),
        )
        cells: list[str] = []
        for value, key in pairs:
            real = course.found.median(key)
            error = value / real - 1 if real else float("nan")
            cells += [f"{value:.1f}", f"{real:.1f}", f"{100 * error:+.0f} %"]
        table.add_row(name, *cells)
    report.tables.append(table)


def checked(course: Course, targets: Sequence[float], state: dict[str, Any]) -> Report:
    report = Report(title="the plug-in in the engine, real SGLang on a CPU")
    found = course.found
    for name, values in found.values.items():
        report.spread[name] = Spread.of(values)
    report.tables.append(_colocation_table(found, course.shares, targets))
    for share in course.shares:
        ratio = found.median(f"select {share} of target")
        name = f"(a) online TPOT over its target, target at {share:.0%}"
        report.checks.append(Check(name=name, value=ratio, target=1.05, unit=""))
    for loose in course.loads:
        stock, slack = f"{loose} loose all", f"{loose} loose slack"
        gain = found.median(f"{slack} met") - found.median(f"{stock} met")
        speed = found.median(f"{slack} per s") / found.median(f"{stock} per s")
        gap = max(found.values[f"{slack} gap"])
        at = f"{TIGHT} tight, {loose} loose"
        report.checks += [
            _least(f"(b) attainment won over stock, {at}", gain, 1e-9, "of all"),
            _least(f"(b) tokens/s over stock, {at}", speed, 0.95, ""),
            Check(name=f"(b) longest wait, {at}", value=gap, target=1.25 * MOST_PARKED_S, unit="s"),
        ]
    chunk_ms = found.median("undisturbed long") / (LONG_PROMPT / CHUNK_TOKENS)
    own = found.median("displaced long") / found.median("undisturbed long")
    report.notes.append(f"a chunk of {CHUNK_TOKENS} tokens takes {chunk_ms:.0f} ms on average")
    waited = found.median("displaced urgent") / chunk_ms
    report.checks += [
        Check(name="(c) online TTFT in chunks, displacing", value=waited, target=2, unit="chunks"),
        Check(name="(c) the long prompt's own TTFT", value=own, target=1.10, unit="of undisturbed"),
    ]
    selecting_us = state["choosing_us"] / max(1, state["chosen_steps"])
    report.checks += [
        Check(name="overhead of a step, selecting", value=selecting_us, target=150, unit="us"),
        Check(name="overhead of a step, mode all", value=resting_us(), target=5, unit="us"),
    ]
    report.notes.append(
        f"selecting: {state['views']:,} choices for {state['view_steps']:,} steps of fewer than "
        f"all; reports {state['reporting_us'] / max(1, state['steps']):.1f} us a step in the engine"
    )
    predicted(course, targets, report)
    return report


def _least(name: str, value: float, target: float, unit: str) -> Check:
    return Check(name=name, value=value, target=target, unit=unit, goal=Goal.AT_LEAST)


def _colocation_table(found: Found, shares: Sequence[float], targets: Sequence[float]) -> Table:
    table = Table(title="8 online and 8 offline, one decode server", title_justify="left")
    for column in ("how", "target ms", "online TPOT ms", "offline tok/s"):
        table.add_column(column, justify="left" if column == "how" else "right")
    rows = [
        ("online alone", "", "alone"),
        ("everyone steps", "", "everyone"),
        ("--enable-priority-scheduling", "", "priority"),
    ]
    for share, target in zip(shares, targets, strict=True):
        rows.append(("admission and abort from outside", f"{target:.1f}", f"abort {share}"))
        rows.append(("selection", f"{target:.1f}", f"select {share}"))
    for how, target_told, name in rows:
        online = Spread.of(found.values[f"{name} online"])
        offline = Spread.of(found.values[f"{name} offline"])
        table.add_row(how, target_told, str(online), str(offline))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_report_options(parser)
    parser.add_argument("--runs", type=int, default=5, help="of each case (5)")
    parser.add_argument("--model", default="tiny", help="as slackwater fleet takes it (tiny)")
    arguments = parser.parse_args()
    try:
        course, targets, state = asyncio.run(
            measured(arguments.model, arguments.runs, quick=arguments.quick)
        )
    except FleetError as error:
        sys.stderr.write(f"benchmarks.plugin: {error}\n")
        return 2
    report = checked(course, targets, state)
    if arguments.quick:
        report.notes.append("quick: one run, one target and one load, half the tokens")
    return report.finish(as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
