"""What choosing who steps wins over stock, on a simulated engine, under many kinds of steps.

The clients of benchmarks.plugin (b), tight and loose, at shares of the knee, on the `patched`
engine. Under each condition the tight target is stock's own median at the knee, and once more 6 %
less than that; loose ones are three times as long. The engine predicts steps by the line and
corrects itself by those it has seen; what holds one of them up it is not told in advance. The rule
was tuned on other seeds. Steps are those of a model: no real engine is meant.
"""

from __future__ import annotations

import random
import statistics
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product, repeat
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.plugin_found import HOLD_STEPS, at_least
from benchmarks.plugin_mixed import (
    KNEE,
    LOADS,
    LOOSE_OVER_TIGHT,
    LOOSE_PROMPTS,
    TIGHT,
    TIGHT_PROMPTS,
    UNTARGETED,
    Answer,
    Asker,
    Targets,
    answers_of,
    mingled,
    rows_of,
    seen,
    spaced,
)
from benchmarks.plugin_model import AsMeasured, circled
from benchmarks.report import Check, Report, Spread, command_line
from policies.clock import Clock, VirtualClock
from policies.packing import PACKING, Packing, Running, StepUs
from policies.step_line import StepLine

STOCK = "all"
RULES = ("most-kept", "slack", "kairos")
TIGHTER = {"": 1.0, ", targets 6 % tighter": 0.94}
AIMS = 3
"""Windows of stock whose median is the target."""
SEEDS, WINDOW_S = 8, 60.0
QUICK_SEEDS, QUICK_S = 2, 20.0
STAGGER_S = 1.5
"""Clients begin within so long."""
SPELL_S = 3.0
LEAST_POINTS, LEAST_WON, LEAST_SPEED, MOST_GAP_S = -1.0, 1.0, 0.95, 2.5

Ratios = Callable[[random.Random, Clock], Iterator[float]]
"""How many times as long as the line says the steps of a window take, one after the other."""


def even(rng: random.Random, clock: Clock) -> Iterator[float]:
    return repeat(1.0)


def each_tenth(rng: random.Random, clock: Clock) -> Iterator[float]:
    while True:
        yield 1.4 if rng.random() < 0.1 else 1.0


def in_spells(rng: random.Random, clock: Clock) -> Iterator[float]:
    """By the clock: it is slow at the same times whoever steps."""
    seed = rng.random()
    while True:
        spell = random.Random(f"{seed} {int(clock.time() / SPELL_S)}").choice((1.0, 1.0, 1.1, 1.2))
        yield spell * (1.4 if rng.random() < 0.08 else rng.uniform(0.98, 1.04))


def singly(rng: random.Random, clock: Clock) -> Iterator[float]:
    while True:
        yield rng.uniform(1.2, 2.2) if rng.random() < 0.08 else rng.uniform(0.97, 1.05)


def in_runs(rng: random.Random, clock: Clock) -> Iterator[float]:
    while True:
        low, high = (1.1, 2.0) if rng.random() < 0.12 else (0.97, 1.05)
        for _ in range(rng.randint(5, 25)):
            yield rng.uniform(low, high)


@dataclass(frozen=True, slots=True)
class Condition:
    """One kind of steps."""

    name: str
    steps: str
    """In words, for those who read the table."""
    line: StepLine
    ratios: Ratios = even
    join_s: float = 0.0
    """Whoever joins halts all for so long."""
    first_s: tuple[float, float] = (0.1, 0.4)
    """From a client's asking until it joins."""
    unseen: float = 1.0
    """So many times as long as any prediction is a step, for good."""


ALONE = StepLine(19_410.0, 24.0, 1.018)
HOST = StepLine(23_500.0, 0.0, 1.06)
UNHELD = StepLine(8_087.0, 118.0, 0.635)
HARDLY = StepLine(42_500.0, 48.0, 0.27)
REPORTED = StepLine(23_277.0, 0.0, 1.0289)
"""Near what real servers with held steps reported; so are the conditions with it."""
AFTER_S = (0.15, 0.45)

CONDITIONS = (
    Condition("the line alone", "19.4 ms + 24 us a request + 1.018 ms for 1,000 tokens", ALONE),
    Condition("with the host's 4 ms", "23.5 ms + 1.06 ms for 1,000 tokens", HOST),
    Condition("each tenth", "the same, each tenth step 40 % longer", HOST, each_tenth),
    Condition("joins", "23.5 ms + 1.06 ms, who joins halts all for 6 ms", HOST, join_s=0.006),
    Condition("both", "each tenth step 40 % longer, joins 6 ms", HOST, each_tenth, 0.006),
    Condition("13 %", "23.5 ms + 1.06 ms, longer than predicted for good", HOST, unseen=1.13),
    Condition(
        "slow spells",
        "23.5 ms + 1.06 ms, half of the time 10 or 20 % slower, 8 % of steps 40 % longer, "
        "joins 7 ms",
        *(HOST, in_spells, 0.007, (0.2, 0.5)),
    ),
    Condition(
        "not held",
        "8.1 ms + 0.118 ms a request + 0.635 ms, each tenth 40 % longer, joins 7 ms",
        *(UNHELD, each_tenth, 0.007, (0.05, 0.2)),
    ),
    Condition(
        "contexts hardly count",
        "42.5 ms + 0.048 ms a request + 0.27 ms, each tenth 40 % longer, joins 6 ms",
        *(HARDLY, each_tenth, 0.006),
    ),
    Condition(
        "as reported, singly",
        "23.3 ms + 1.03 ms, 8 % of steps 1.2 to 2.2 times as long, joins 5.3 ms",
        *(REPORTED, singly, 0.0053, AFTER_S),
    ),
    Condition(
        "as reported, in runs",
        "23.3 ms + 1.03 ms, 12 % of steps 1.1 to 2 times as long, in runs of 5 to 25, joins 5.3 ms",
        *(REPORTED, in_runs, 0.0053, AFTER_S),
    ),
)


@dataclass(frozen=True, slots=True)
class Misled:
    """A packing that is told of steps shorter than they are, whatever was seen of them."""

    packing: Packing
    unseen: float

    @property
    def by_longest(self) -> bool:
        return self.packing.by_longest

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        def shorter_us(count: int, context_tokens: int, longest_tokens: int) -> float:
            return step_us(count, context_tokens, longest_tokens) / self.unseen

        return self.packing.choose(running, shorter_us)


@contextmanager
def misled(rule: str, unseen: float) -> Iterator[str]:
    """By the name under which an engine finds it."""
    if rule == STOCK or unseen == 1.0:
        yield rule
        return
    name = f"{rule} misled"
    PACKING[name] = Misled(PACKING[rule], unseen)
    try:
        yield name
    finally:
        del PACKING[name]


def clients() -> tuple[list[Asker], list[Asker]]:
    """Tight ones, and loose ones for the highest load; the same under each condition."""
    rng = random.Random("prompts")

    def asking(tokens: int, *, is_tight: bool) -> Asker:
        return Asker(prompt=[rng.randrange(10**6) for _ in range(tokens)], is_tight=is_tight)

    most = round(max(LOADS) * KNEE)
    tight = [asking(it, is_tight=True) for it in spaced(TIGHT_PROMPTS, TIGHT)]
    return tight, [asking(it, is_tight=False) for it in mingled(spaced(LOOSE_PROMPTS, most))]


@dataclass(frozen=True, slots=True)
class Place:
    condition: Condition
    load: float
    askers: Sequence[Asker]

    def play(self, rule: str, seed: str, targets: Targets, until_s: float) -> list[list[Answer]]:
        """A window from an idle engine on; what is drawn is the same for every rule."""
        condition, clock = self.condition, VirtualClock()
        seed = f"held out {seed} {condition.name} {self.load:g}"
        steps, firsts, begins = (random.Random(f"{it} {seed}") for it in ("step", "first", "begin"))
        held = (condition.unseen * it for it in condition.ratios(steps, clock))
        with misled(rule, condition.unseen) as packing:
            heard = circled(
                AsMeasured(condition.line, repeat(condition.join_s), held),
                rows_of(self.askers, targets, seed),
                packing,
                HOLD_STEPS,
                again_s=drawn(firsts, *condition.first_s),
                until_s=until_s,
                begin_s=drawn(begins, 0.0, STAGGER_S),
                clock=clock,
            )
        return answers_of(heard)


def drawn(rng: random.Random, low: float, high: float) -> Iterator[float]:
    while True:
        yield rng.uniform(low, high)


class Won(NamedTuple):
    """Over stock, with one seed."""

    points: float
    speed: float
    gap_s: float
    """The rule's own longest wait for a token."""


class Key(NamedTuple):
    condition: str
    tighter: str
    load: float


@dataclass(slots=True)
class Bench:
    rule: str
    seeds: int
    until_s: float
    conditions: Sequence[Condition] = CONDITIONS
    loads: Sequence[float] = LOADS
    won: dict[Key, list[Won]] = field(default_factory=dict)
    tight_ms: dict[str, float] = field(default_factory=dict)
    """Stock's median at the knee, by condition."""

    def run(self, advance: Callable[[], object]) -> None:
        tight, loose = clients()
        for condition in self.conditions:
            places = {
                load: Place(condition, load, [*tight, *loose[: round(load * KNEE)]])
                for load in {*self.loads, 1.0}
            }
            self.tight_ms[condition.name] = self._aim(places[1.0])
            advance()
            for load, number in product(self.loads, range(self.seeds)):
                self._compare(places[load], str(number))
                advance()

    @property
    def total(self) -> int:
        return len(self.conditions) * (1 + len(self.loads) * self.seeds)

    def _aim(self, knee: Place) -> float:
        windows = (knee.play(STOCK, f"aim {it}", UNTARGETED, self.until_s) for it in range(AIMS))
        return statistics.median(
            seen(knee.askers, it, UNTARGETED, 0.0, self.until_s).tight_ms for it in windows
        )

    def _compare(self, place: Place, seed: str) -> None:
        """Stock does not look at targets: one window of it stands beside both."""
        name, until_s = place.condition.name, self.until_s
        stock = place.play(STOCK, seed, UNTARGETED, until_s)
        for tighter, scale in TIGHTER.items():
            tight_ms = scale * self.tight_ms[name]
            targets = Targets(tight_ms, LOOSE_OVER_TIGHT * tight_ms)
            theirs = seen(place.askers, stock, targets, 0.0, until_s)
            answers = place.play(self.rule, seed, targets, until_s)
            ours = seen(place.askers, answers, targets, 0.0, until_s)
            points, speed = 100 * (ours.met - theirs.met), ours.per_s / theirs.per_s
            self.won.setdefault(Key(name, tighter, place.load), []).append(
                Won(points, speed, ours.gap_s)
            )

    # What it came to.

    def at(self, load: float, tighter: str | None = None) -> dict[Key, list[Won]]:
        return {
            key: won
            for key, won in self.won.items()
            if key.load == load and tighter in (None, key.tighter)
        }

    def tell(self, report: Report) -> None:
        report.tables.append(self._table())
        for load in self.loads:
            report.checks += self._checks(load)
            found = self.at(load)
            points = {key: points_of(won) for key, won in found.items()}
            speeds = {key: speed_of(won) for key, won in found.items()}
            at = f"{load:g} of the knee"
            report.spread[f"points won, {at}"] = Spread.of(points.values())
            report.spread[f"tokens/s over stock, {at}"] = Spread.of(speeds.values())
            least, slowest = (min(it, key=it.__getitem__) for it in (points, speeds))
            report.notes += [
                f"least won, {at}: {points[least]:+.1f} points, {least.condition}{least.tighter}",
                f"fewest tokens/s, {at}: {100 * speeds[slowest]:.1f} % of stock, "
                f"{slowest.condition}{slowest.tighter}",
            ]
        report.notes.append(
            f"{self.rule}, {self.seeds} seeds of {self.until_s:g} s of virtual time at each place; "
            "steps are those of a model, no real engine is meant"
        )

    def _checks(self, load: float) -> list[Check]:
        found, at = self.at(load), f"{load:g} of the knee"
        least = min(points_of(won) for won in found.values())
        slowest = min(speed_of(won) for won in found.values())
        gap_s = max(it.gap_s for won in found.values() for it in won)
        checks = [
            at_least(f"points won, {at}, least of all conditions", least, LEAST_POINTS, "points"),
            at_least(f"tokens/s over stock, {at}, least of all", slowest, LEAST_SPEED, ""),
            Check(name=f"longest wait, {at}", value=gap_s, target=MOST_GAP_S, unit="s"),
        ]
        if load >= 1:
            for tighter in TIGHTER:
                mean = statistics.fmean(points_of(it) for it in self.at(load, tighter).values())
                name = f"points won, {at}, mean of all conditions{tighter}"
                checks.append(at_least(name, mean, LEAST_WON, "points"))
        return checks

    def _table(self) -> Table:
        title = f"{self.rule} over stock: points won (least to most), tokens/s in %, longest wait"
        table = Table(title=title, title_justify="left", show_lines=True)
        table.add_column("steps")
        table.add_column("tight ms", justify="right")
        for load in self.loads:
            table.add_column(f"{load:g} of the knee", justify="right", no_wrap=True)
        for condition, (tighter, scale) in product(self.conditions, TIGHTER.items()):
            name = condition.name
            cells = [told(self.won[Key(name, tighter, load)]) for load in self.loads]
            about = tighter.removeprefix(", ") or f"{name}: {condition.steps}"
            table.add_row(about, f"{scale * self.tight_ms[name]:.1f}", *cells)
        return table


def points_of(won: Sequence[Won]) -> float:
    return statistics.fmean(it.points for it in won)


def speed_of(won: Sequence[Won]) -> float:
    return statistics.fmean(it.speed for it in won)


def told(won: Sequence[Won]) -> str:
    points = sorted(it.points for it in won)
    return (
        f"{points_of(won):+.1f} ({points[0]:+.0f} to {points[-1]:+.0f})\n"
        f"{100 * speed_of(won):.1f} %, {max(it.gap_s for it in won):.2f} s"
    )


def counted(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError("a whole number, 1 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = command_line("packing", __doc__)
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help="who steps")
    parser.add_argument("--seeds", type=counted, help=f"windows at each place ({SEEDS})")
    arguments = parser.parse_args(argv)
    seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
    bench = Bench(arguments.rule, seeds, QUICK_S if arguments.quick else WINDOW_S)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(bench.rule, total=bench.total)
        bench.run(lambda: progress.advance(bar))
    report = Report(title="packing")
    bench.tell(report)
    if arguments.quick:
        report.notes.append(f"--quick: {seeds} seeds of {QUICK_S:g} s")
    return report.finish(as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
