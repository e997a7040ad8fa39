"""How long the scheduling core thinks: the time of one `handle` call while jobs are queued.

A busy fleet in steady state, without sockets: each turn a prompt ends and another one is dispatched
in its place, a decode ends, a job arrives, and now and then all running jobs report progress. Every
call is timed by itself, in CPU time: the time it takes on a quiet machine, and what others take is
left out on a busy one. A call that contains a dispatch is a decision.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from benchmarks.load import quantile
from benchmarks.processes import Watch
from benchmarks.report import Check, Report, Spread, add_report_options, number
from gateway.collector import run_rarely
from gateway.core import Core, Rules
from policies.events import (
    Arrived,
    Decision,
    Dispatch,
    Event,
    Finished,
    FirstToken,
    PrefillDone,
    Progress,
)
from policies.registry import ORDER
from policies.types import Job, Kind, Role, Worker

PREFILLS, DECODES = 8, 24
MODEL = "bench"
CHUNK_TOKENS = 8192
KV_TOKENS = 1_000_000
RUNNING = 1500
TICK_TURNS = 20
TURN_US = 1000
FAR_US = 10**12
DECISION = "decision"
DEPTHS = (100, 1_000, 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    rounds: int
    turns: int


FULL, QUICK = Effort(rounds=5, turns=5000), Effort(rounds=3, turns=1000)


def workers() -> Iterator[Worker]:
    for role, count in ((Role.PREFILL, PREFILLS), (Role.DECODE, DECODES)):
        for index in range(count):
            name = f"{role}-{index}"
            yield Worker(
                name=name,
                url=f"http://{name}",
                role=role,
                model=MODEL,
                kv_tokens=KV_TOKENS,
                chunk_tokens=CHUNK_TOKENS,
            )


@dataclass(slots=True)
class Traffic:
    """Jobs of both kinds, with lengths as in chat and in documents, from one seed."""

    chance: random.Random
    made: int = 0

    def job(self, now_us: int) -> Job:
        self.made += 1
        kind = Kind.ONLINE if self.chance.random() < 0.5 else Kind.OFFLINE
        return Job(
            id=f"job-{self.made}",
            kind=kind,
            model=MODEL,
            prompt_tokens=self.chance.randint(200, 6000),
            max_tokens=self.chance.randint(16, 1024),
            arrival_us=now_us,
            deadline_us=now_us + self.chance.randint(100_000, 5_000_000),
            give_up_us=now_us + FAR_US,
            tpot_us=50_000 if kind is Kind.ONLINE else 0,
        )


@dataclass(slots=True)
class Trial:
    """One core at one depth of its queue, and the times of its calls by their kind."""

    depth: int
    core: Core
    traffic: Traffic
    now_us: int = 1
    prefilling: deque[str] = field(default_factory=deque)
    decoding: deque[str] = field(default_factory=deque)
    times_us: dict[str, array[float]] = field(
        default_factory=lambda: defaultdict(lambda: array("d"))
    )

    @property
    def queued(self) -> int:
        return self.core.queued(Kind.ONLINE) + self.core.queued(Kind.OFFLINE)

    def tell(self, event: Event) -> None:
        began = time.thread_time_ns()
        decisions = self.core.handle((event,), self.now_us)
        took_us = (time.thread_time_ns() - began) / 1000
        kind = DECISION if self.note(decisions) else type(event).__name__
        self.times_us[kind].append(took_us)

    def note(self, decisions: list[Decision]) -> int:
        sent = [each.job.id for each in decisions if isinstance(each, Dispatch)]
        self.prefilling.extend(sent)
        return len(sent)

    def fill(self) -> None:
        while self.queued < self.depth:
            self.tell(Arrived(self.traffic.job(self.now_us)))

    def turn(self, number: int) -> None:
        self.now_us += TURN_US
        done = self.prefilling.popleft()
        self.tell(PrefillDone(done))
        self.tell(FirstToken(done))
        self.decoding.append(done)
        if len(self.decoding) > RUNNING:
            self.tell(Finished(self.decoding.popleft(), generated=200))
        if number % TICK_TURNS == 0:
            grown = tuple((job_id, 1 + number // TICK_TURNS) for job_id in self.decoding)
            self.tell(Progress(grown))
        self.fill()


def trial(depth: int, order: str, seed: int, turns: int) -> Trial:
    rules = Rules(order=ORDER[order](), max_queued=10 * max(DEPTHS))
    it = Trial(depth, Core(rules, workers()), Traffic(random.Random(seed)))
    it.fill()
    for number_ in range(RUNNING):
        it.turn(number_)
    it.times_us.clear()
    for number_ in range(turns):
        it.turn(number_)
    return it


def us(trials: list[Trial], kind: str, share: float) -> Spread:
    return Spread.of(quantile(each.times_us[kind], share) or 0.0 for each in trials)


def table(depth: int, order: str, trials: list[Trial]) -> Table:
    title = f"{depth:,} jobs queued, order = {order}: microseconds a call"
    grid = Table(title=title, title_justify="left")
    for column in ("call", "calls", "p50", "p99", "most"):
        grid.add_column(column, justify="left" if column == "call" else "right")
    for kind in sorted(trials[0].times_us, key=lambda each: (each != DECISION, each)):
        calls = sum(len(each.times_us[kind]) for each in trials)
        most = max(max(each.times_us[kind], default=0.0) for each in trials)
        row = (str(us(trials, kind, 0.5)), str(us(trials, kind, 0.99)), number(most))
        grid.add_row(kind, f"{calls:,}", *row)
    return grid


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.core",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""\
The fleet: {PREFILLS} prefill and {DECODES} decode servers, {RUNNING} jobs decoding. Half of the
jobs are online. Every figure is the median over the rounds, with the least and the most of them.
The garbage collector runs as it does in service.

examples:
  python -m benchmarks.core
  python -m benchmarks.core --quick --json
  python -m benchmarks.core --order edf salvage hrrn kairos
""",
    )
    parser.add_argument(
        "--order",
        choices=sorted(ORDER),
        nargs="+",
        default=["edf"],
        metavar="NAME",
        help=f"of the queue, several in turn; of {', '.join(sorted(ORDER))} (default: edf)",
    )
    parser.add_argument("--rounds", type=int, help="trials at each depth, each with a new seed")
    add_report_options(parser)
    return parser.parse_args()


def measured(
    orders: Sequence[str], seeds: Iterable[int], turns: int
) -> dict[tuple[int, str], list[Trial]]:
    """The orders in turn, seed by seed: what disturbs one disturbs the others."""
    found: dict[tuple[int, str], list[Trial]] = {
        (depth, order): [] for depth in DEPTHS for order in orders
    }
    for depth in DEPTHS:
        for seed in seeds:
            for order in orders:
                found[depth, order].append(trial(depth, order, seed, turns))
    return found


def checks(order: str, found: dict[tuple[int, str], list[Trial]]) -> Iterator[Check]:
    p99 = us(found[10_000, order], DECISION, 0.99).median
    p50 = us(found[1_000, order], DECISION, 0.5).median
    yield Check(name=f"{order}: decision at 10,000 queued, p99", value=p99, target=200, unit="us")
    yield Check(name=f"{order}: decision at 1,000 queued, median", value=p50, target=30, unit="us")


def main() -> int:
    asked = parsed()
    effort = QUICK if asked.quick else FULL
    orders = tuple(dict.fromkeys(asked.order))
    report, watch = Report(title="core"), Watch.begin()
    run_rarely()
    if asked.quick:
        report.notes.append(f"--quick: {effort}, instead of {FULL}")
    found = measured(orders, range(asked.rounds or effort.rounds), effort.turns)
    report.notes.append(watch.note())
    for (depth, order), trials in found.items():
        report.tables.append(table(depth, order, trials))
        for share in (0.5, 0.99):
            name = f"{order}: decision at {depth} queued, p{share * 100:.0f}, us"
            report.spread[name] = us(trials, DECISION, share)
    report.checks = [check for order in orders for check in checks(order, found)]
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
