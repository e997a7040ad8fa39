"""(b) Tight and loose targets, short and long contexts: Kairos's packing beside a step of all.

So many clients ask, each anew as soon as it was answered. At the knee a step of all takes as long
as the tight target allows: by that the target is chosen, and the loads are shares of the knee.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import NamedTuple

from rich.table import Table

from backends.fleet.spec import FleetError
from benchmarks.plugin_found import (
    HOLD_STEPS,
    MOST_PARKED_S,
    Effort,
    Found,
    at_least,
    error_of,
    say,
)
from benchmarks.plugin_model import PACKINGS, AsMeasured, Row, Told, circled
from benchmarks.plugin_site import Site, Stream
from benchmarks.report import Check, Report, Spread
from policies.step_line import SeenStep, StepLine, fitted

TIGHT, KNEE = 6, 6
"""Clients with tight targets; clients with loose ones at the knee."""
LOADS = (0.5, 1.0, 1.5, 2.0)
"""Of the loose clients at the knee. Below it stock keeps everything, and nothing can be won."""
LOOSE_OVER_TIGHT = 3.0
TIGHT_PROMPTS, LOOSE_PROMPTS = (200, 500), (2500, 3600)
ANSWERS = (40, 120)
MODES = ("all", "slack")
WINDOWS_S = {False: (2.5, 6.0), True: (8.0, 12.0)}
"""Quick and usual; held steps are longer."""
MOST_ASKS = 1_000
MOST_VOID = 3
REPORTED_WITHIN_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """One client."""

    prompt: list[int]
    is_tight: bool

    def answers(self, seed: str) -> list[int]:
        """How many tokens each of its answers has."""
        rng = random.Random(f"{seed} {self.prompt[:4]}")
        return [rng.randint(*ANSWERS) for _ in range(MOST_ASKS)]


class Answer(NamedTuple):
    """What a client saw of one request."""

    times_s: list[float]
    tokens: int
    has_ended: bool

    @property
    def tpot_ms(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) * 1e3 / max(1, self.tokens - 1)

    def gap_s(self, until_s: float) -> float:
        times = self.times_s if self.has_ended else [*self.times_s, until_s]
        return max((b - a for a, b in pairwise(times)), default=0.0)


class Seen(NamedTuple):
    met: float
    """Of a client's requests, the mean of all clients: who is served faster asks more often."""
    per_s: float
    gap_s: float
    tight_ms: float
    loose_ms: float
    requests: int


def seen(
    askers: Sequence[Asker],
    answers: Sequence[Sequence[Answer]],
    targets: Targets,
    from_s: float,
    until_s: float,
) -> Seen:
    met: list[float] = []
    paces: dict[bool, list[float]] = {True: [], False: []}
    for asker, own in zip(askers, answers, strict=True):
        ended = [it.tpot_ms for it in own if it.has_ended]
        target_ms = targets.of(asker)
        met.append(sum(it <= target_ms for it in ended) / len(ended) if ended else 0.0)
        paces[asker.is_tight] += ended
    everything = [it for own in answers for it in own]
    return Seen(
        statistics.fmean(met),
        sum(it.tokens for it in everything) / (until_s - from_s),
        max(it.gap_s(until_s) for it in everything),
        statistics.median(paces[True]),
        statistics.median(paces[False] or [float("inf")]),
        len(everything),
    )


class Targets(NamedTuple):
    tight_ms: float
    loose_ms: float

    def of(self, asker: Asker) -> float:
        return self.tight_ms if asker.is_tight else self.loose_ms


UNTARGETED = Targets(1e3, 1e3)


@dataclass(slots=True)
class Mixed:
    site: Site
    effort: Effort
    found: Found
    targets: Targets = UNTARGETED
    steps: dict[tuple[float, str], list[list[SeenStep]]] = field(default_factory=dict)
    """By load and mode, of each run."""
    tight: list[Asker] = field(default_factory=list)
    loose: list[Asker] = field(default_factory=list)
    first_s: dict[float, list[float]] = field(default_factory=dict)
    """Times to the first token on stock, by load."""
    void: int = 0
    """Windows in which a request failed."""

    @property
    def loads(self) -> tuple[float, ...]:
        return LOADS[2:3] if self.effort.quick else LOADS

    @property
    def seconds(self) -> float:
        quick, usual = WINDOWS_S[bool(self.effort.held)]
        return quick if self.effort.quick else usual

    def askers(self, load: float) -> list[Asker]:
        return [*self.tight, *self.loose[: round(load * KNEE)]]

    async def measure(self) -> None:
        await self._begin()
        async with self.site.listening() as steps:
            await self._aim(steps)
            for number in range(self.effort.runs):
                for load in self.loads:
                    await self._pair(load, number, steps)

    async def _begin(self) -> None:
        site, most = self.site, round(max(self.loads) * KNEE)
        self.tight = [
            Asker(prompt=site.prompt(self.effort.of(tokens)), is_tight=True)
            for tokens in spaced(TIGHT_PROMPTS, TIGHT)
        ]
        self.loose = [
            Asker(prompt=site.prompt(self.effort.of(tokens)), is_tight=False)
            for tokens in mingled(spaced(LOOSE_PROMPTS, most))
        ]
        everybody = [site.send(it.prompt, 2) for it in (*self.tight, *self.loose)]
        await site.over(everybody)  # prompts are in the cache from here on

    async def _aim(self, steps: list[SeenStep]) -> None:
        at_knee = await self._ask("all", 1.0, UNTARGETED, steps, "the knee")
        self.targets = Targets(at_knee.tight_ms, LOOSE_OVER_TIGHT * at_knee.tight_ms)
        self.steps.clear()  # from here on, pairs

    async def _pair(self, load: float, number: int, steps: list[SeenStep]) -> None:
        say(f"(b) {load:g} of the knee, run {number + 1} of {self.effort.runs}")
        got: dict[str, Seen] = {}
        for mode in MODES[:: 1 - 2 * (number % 2)]:  # each first in every other run
            got[mode] = await self._ask(mode, load, self.targets, steps, f"{number} {load}")
            self._note(f"{load} {mode}", got[mode])
        won, speed = got["slack"].met - got["all"].met, got["slack"].per_s
        self.found.add(f"{load} won", 100 * won)
        self.found.add(f"{load} speed", speed / got["all"].per_s)

    def _note(self, name: str, got: Seen) -> None:
        say(f"    {name}: {100 * got.met:.0f} % met, {got.per_s:.0f} tokens/s")
        for what, value in got._asdict().items():
            self.found.add(f"{name} {what}", value)

    async def _ask(
        self, mode: str, load: float, targets: Targets, steps: list[SeenStep], seed: str
    ) -> Seen:
        """Until no request has failed: now and then SGLang's own transfers do, all for a while."""
        for _ in range(MOST_VOID):
            got = await self._window(mode, load, targets, steps, seed)
            if got is not None:
                return got
            self.void += 1
            say(f"    {mode}: transfers failed, asked again")
        raise FleetError(f"transfers between the servers failed {MOST_VOID} times in a row")

    async def _window(
        self, mode: str, load: float, targets: Targets, steps: list[SeenStep], seed: str
    ) -> Seen | None:
        """All clients of a load for some seconds; None where a request has failed."""
        site, askers, loop = self.site, self.askers(load), asyncio.get_running_loop()
        await site.set(mode, hold_steps=HOLD_STEPS, most_parked_us=MOST_PARKED_S * 1e6)
        await asyncio.sleep(REPORTED_WITHIN_S)
        known, began_s = len(steps), loop.time()
        circles: list[list[Stream]] = [[] for _ in askers]
        tasks = [
            asyncio.create_task(self._circle(asker, seed, targets.of(asker), circle))
            for asker, circle in zip(askers, circles, strict=True)
        ]
        await asyncio.sleep(self.seconds)
        ended_s = loop.time()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        answers = [[answer_of(it, ended_s) for it in own if it.events] for own in circles]
        await site.stop([stream for own in circles for stream in own])
        await asyncio.sleep(REPORTED_WITHIN_S)
        if any(it.has_failed for own in circles for it in own[:-1]):
            return None
        self.steps.setdefault((load, mode), []).append(steps[known:])
        if mode == "all":
            self.first_s.setdefault(load, []).extend(
                it.ttft_ms / 1e3 for own in circles for it in own[1:] if it.events
            )
        return seen(askers, answers, targets, began_s, ended_s)

    async def _circle(
        self, asker: Asker, seed: str, target_ms: float, circle: list[Stream]
    ) -> None:
        for tokens in asker.answers(seed):
            circle.append(self.site.send(asker.prompt, tokens, tpot_ms=target_ms))
            await self.site.over(circle[-1:])

    # What it came to.

    def tell(self, report: Report) -> None:
        found = self.found
        for load in self.loads:
            won, speed = found.median(f"{load} won"), found.median(f"{load} speed")
            gap_s = max(found.values[f"{load} slack gap_s"])
            at = f"{load:g} of the knee"
            least = 1 if load >= 1 else -2
            report.checks += [
                at_least(f"(b) attainment won over stock, {at}", won, least, "points"),
                at_least(f"(b) tokens/s over stock, {at}", speed, 0.95, ""),
                Check(name=f"(b) longest wait, {at}", value=gap_s, target=2.5, unit="s"),
            ]
        if self.void:
            report.notes.append(f"(b) {self.void} windows in which transfers failed were left out")
        report.tables.append(self._table())
        report.tables.append(self._predicted(report))

    def _table(self) -> Table:
        title = (
            f"{TIGHT} clients with {self.targets.tight_ms:.1f} ms a token, others with "
            f"{self.targets.loose_ms:.1f} ms"
        )
        table = Table(title=title, title_justify="left")
        for column in (
            *("loose clients", "who steps", "targets met, %", "tokens/s"),
            *("tight TPOT ms", "loose TPOT ms", "longest wait s"),
        ):
            table.add_column(column, justify="left" if column == "who steps" else "right")
        for load in self.loads:
            for mode, how in (("all", "all (stock)"), ("slack", "slack")):
                of = {what: self.found.values[f"{load} {mode} {what}"] for what in Seen._fields}
                of["met"] = [100 * it for it in of["met"]]
                cells = [str(Spread.of(of[what])) for what in ("met", "per_s")]
                cells += [str(Spread.of(of[what])) for what in ("tight_ms", "loose_ms", "gap_s")]
                table.add_row(f"{round(load * KNEE)} ({load:g} of the knee)", how, *cells)
        return table

    def _predicted(self, report: Report) -> Table:
        """What the patched simulator makes of the same clients with the measured line of steps."""
        line = self._line()
        count = sum(len(steps) for runs in self.steps.values() for steps in runs)
        report.notes.append(
            f"(b) measured step: {line.base_us:.0f} us + {line.request_us:.0f} us a request + "
            f"{line.token_us * 1000:.1f} us for 1,000 tokens of context ({count} steps)"
        )
        held = {load: Held.of(line, self._stock(load), self.first_s[load]) for load in self.loads}
        for load in self.loads:
            beside = Spread.of(self.by_the_line(line, load))
            report.notes.append(
                f"(b) tokens/s over stock by the line, {load:g} of the knee: {beside}"
            )
        report.notes += [f"(b) stock at {load:g} of the knee: {it}" for load, it in held.items()]
        table = Table(title="(b) simulated with the measured steps", title_justify="left")
        for column in ("case", "met, %", "real", "error, points", "tokens/s", "real", "error"):
            table.add_column(column, justify="left" if column == "case" else "right")
        for load in self.loads:
            for mode in ("all", "slack"):
                runs = [
                    self._simulated(line, held[load], load, mode, f"{run} {load}")
                    for run in range(self.effort.runs)
                ]
                met = 100 * statistics.median(it.met for it in runs)
                per_s = statistics.median(it.per_s for it in runs)
                real = 100 * self.found.median(f"{load} {mode} met")
                speed = self.found.median(f"{load} {mode} per_s")
                told = [f"{met:.0f}", f"{real:.0f}", f"{met - real:+.0f}"]
                told += [f"{per_s:.0f}", f"{speed:.0f}", error_of(per_s, speed)]
                table.add_row(f"{load:g} of the knee, {mode}", *told)
        return table

    def _stock(self, load: float) -> list[SeenStep]:
        return [step for steps in self.steps[load, "all"] for step in steps]

    def by_the_line(self, line: StepLine, load: float) -> list[float]:
        """Tokens/s over stock of each pair, had every step taken what the line says."""
        stock, slack = (
            [
                sum(it.requests for it in run) / sum(line.step_us(*it[:2]) for it in run)
                for run in runs
            ]
            for runs in (self.steps[load, mode] for mode in MODES)
        )
        return [ours / theirs for theirs, ours in zip(stock, slack, strict=True)]

    def _line(self) -> StepLine:
        usual = [
            step
            for (_, mode), runs in self.steps.items()
            for steps in runs
            for step in (told_apart(steps)[0] if mode == "all" else steps)
        ]
        line = fitted(usual)
        assert line is not None
        return line

    def _simulated(self, line: StepLine, held: Held, load: float, mode: str, seed: str) -> Seen:
        rng = random.Random(seed)
        askers = self.askers(load)
        times = AsMeasured(line, again(held.joins_s, rng), again(held.ratios, rng))
        heard = circled(
            times,
            rows_of(askers, self.targets, seed),
            PACKINGS[mode],
            HOLD_STEPS,
            again_s=again(held.first_s, rng),
            until_s=self.seconds,
        )
        return seen(askers, answers_of(heard), self.targets, 0.0, self.seconds)


class Joining(NamedTuple):
    """A step before which somebody joined."""

    step: SeenStep
    joined: int


def told_apart(steps: Sequence[SeenStep]) -> tuple[list[SeenStep], list[Joining]]:
    """Where all step, there are more of them only when somebody has joined."""
    usual: list[SeenStep] = []
    joining: list[Joining] = []
    for before, step in pairwise(steps):
        if (joined := step.requests - before.requests) > 0:
            joining.append(Joining(step, joined))
        else:
            usual.append(step)
    return usual, joining


class Held(NamedTuple):
    """What stock SGLang's steps took beside the line, in the order in which they came."""

    ratios: list[float]
    """Of steps that nobody joined before, to the line: other processes take the cores at times."""
    joins_s: list[float]
    """How much longer a step takes for each who joins before it."""
    first_s: list[float]
    """From a client's asking to its first token."""

    @classmethod
    def of(cls, line: StepLine, steps: Sequence[SeenStep], first_s: Sequence[float]) -> Held:
        usual, joining = told_apart(steps)
        more_us = [(it.step.took_us - line.step_us(*it.step[:2])) / it.joined for it in joining]
        return cls(
            [it.took_us / line.step_us(*it[:2]) for it in usual] or [1.0],
            [max(0.0, it) / 1e6 for it in more_us] or [0.0],
            [*first_s] or [0.0],
        )

    def __str__(self) -> str:
        ratio = statistics.fmean(self.ratios)
        join_ms, first_ms = (1e3 * statistics.fmean(it) for it in (self.joins_s, self.first_s))
        return (
            f"a step takes {ratio:.2f} of the line, who joins halts all for {join_ms:.1f} ms, "
            f"{first_ms:.0f} ms after asking"
        )


def again(values: Sequence[float], rng: random.Random) -> Iterator[float]:
    """In the order in which they were seen, from anywhere on: what is slow, is so for a while."""
    start = rng.randrange(len(values))
    return cycle([*values[start:], *values[:start]])


def spaced(bounds: tuple[int, int], count: int) -> list[int]:
    low, high = bounds
    return [low + (high - low) * i // max(1, count - 1) for i in range(count)]


def mingled(values: list[int]) -> list[int]:
    """Any first few of them are about as long as all."""
    return [it for _, it in sorted(enumerate(values), key=lambda pair: pair[0] * 7 % len(values))]


def answer_of(stream: Stream, until_s: float) -> Answer:
    events = [(at_s, count) for at_s, count in stream.events if at_s <= until_s]
    tokens = events[-1][1] if events else 0
    return Answer([at_s for at_s, _ in events], tokens, tokens >= stream.limit)


def told_of(told: Told) -> Answer:
    return Answer(told.times_s, len(told.times_s), told.has_ended)


def answers_of(heard: Sequence[Sequence[Told]]) -> list[list[Answer]]:
    return [[told_of(it) for it in own if it.times_s] for own in heard]


def rows_of(askers: Sequence[Asker], targets: Targets, seed: str) -> list[list[Row]]:
    """What each of them asks of a simulated engine."""
    return [
        [
            Row(prompt_tokens=len(it.prompt), tokens=tokens, tpot_ms=targets.of(it))
            for tokens in it.answers(seed)
        ]
        for it in askers
    ]
