"""Every cell of the comparison, on as many processes as are given, always in the same order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from gateway.simulation.figures import (
    Distributions,
    Figures,
    distributions_of,
    figures_of,
)
from gateway.simulation.moves import Moved
from gateway.simulation.plan import Plan
from gateway.simulation.progress import Shares, write_share
from gateway.simulation.records import Record, RunFacts
from gateway.simulation.world import Case, Tick, Timeline, World

Keep = Callable[[RunFacts, Sequence[Record]], object]
"""Takes the requests of a run, which are forgotten after it."""
LOOK_S = 0.5
"""How often it is asked how far runs in other processes are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is left of a run once its requests have been written down."""

    facts: RunFacts
    figures: list[Figures]
    distributions: list[Distributions]
    timeline: Timeline
    sources: tuple[str, ...]
    moves: list[Moved]


def cases_of(plan: Plan) -> list[Case]:
    scenario = plan.scenario
    return [
        Case(policy=policy, load=load, seed=seed)
        for load in scenario.sweep.values
        for policy in scenario.policy
        for seed in scenario.seeds
    ]


def run_all(plan: Plan, *, processes: int, keep: Keep | None, tick: Tick) -> list[Outcome]:
    """`tick` hears what share of all is done."""
    cases = cases_of(plan)
    if processes > 1 and len(cases) > 1:
        found = _beside(plan, cases, processes, tick, with_records=keep is not None)
    else:
        found = _one_by_one(plan, cases, tick, with_records=keep is not None)
    outcomes = []
    with closing(found):
        for outcome, records in found:
            if keep is not None:
                keep(outcome.facts, records)
            outcomes.append(outcome)
    tick(1.0)
    return outcomes


def run_case(
    plan: Plan, case: Case, *, with_records: bool, tick: Tick | None = None
) -> tuple[Outcome, list[Record]]:
    ran = World(plan, case, tick).run()
    outcome = Outcome(
        facts=ran.facts,
        figures=figures_of(ran.facts, ran.records),
        distributions=distributions_of(ran.facts, ran.records),
        timeline=ran.timeline,
        sources=ran.sources,
        moves=ran.moves,
    )
    return outcome, ran.records if with_records else []


def _one_by_one(
    plan: Plan, cases: Sequence[Case], tick: Tick, *, with_records: bool
) -> Generator[tuple[Outcome, list[Record]], None, None]:
    for done, case in enumerate(cases):

        def within(share: float, done: int = done) -> None:
            tick((done + share) / len(cases))

        yield run_case(plan, case, with_records=with_records, tick=within)


def _beside(
    plan: Plan, cases: Sequence[Case], processes: int, tick: Tick, *, with_records: bool
) -> Generator[tuple[Outcome, list[Record]], None, None]:
    """No more runs are begun than are soon taken: their requests would fill the memory."""
    waiting, others = iter(enumerate(cases)), set(active_children())
    context, processes = get_context("spawn"), min(processes, len(cases))
    with (
        TemporaryDirectory(prefix="slackwater-simulate-") as folder,
        ProcessPoolExecutor(processes, context, initializer=_leave_interrupts) as pool,
    ):
        path = Path(folder) / "shares"
        shares = Shares(path, len(cases))

        def begin(numbered: tuple[int, Case]) -> Future[tuple[Outcome, list[Record]]]:
            number, case = numbered
            told = partial(write_share, path, number)
            return pool.submit(run_case, plan, case, with_records=with_records, tick=told)

        running = [begin(case) for case in islice(waiting, processes + 1)]
        try:
            while running:
                while not wait(running[:1], timeout=LOOK_S).done:
                    tick(shares.of_all())
                yield running[0].result()
                del running[0]
                running += [begin(case) for case in islice(waiting, 1)]
        finally:
            if running:  # nobody wants the others any more
                for child in set(active_children()) - others:
                    child.terminate()


def _leave_interrupts() -> None:
    """The process in front of them ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
