"""Every cell of the comparison, on as many processes as are given, always in the same order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing import active_children, get_context

from gateway.scenario import Plan
from gateway.simulation.figures import (
    Distributions,
    Figures,
    distributions_of,
    figures_of,
)
from gateway.simulation.records import Record, RunFacts
from gateway.simulation.world import Case, Tick, Timeline, World

Keep = Callable[[RunFacts, Sequence[Record]], object]
"""Takes the requests of a run, which are forgotten after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is left of a run once its requests have been written down."""

    facts: RunFacts
    figures: list[Figures]
    distributions: list[Distributions]
    timeline: Timeline
    sources: tuple[str, ...]


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
        found = _beside(plan, cases, min(processes, len(cases)), with_records=keep is not None)
    else:
        found = _one_by_one(plan, cases, tick, with_records=keep is not None)
    outcomes = []
    with closing(found):
        for outcome, records in found:
            if keep is not None:
                keep(outcome.facts, records)
            outcomes.append(outcome)
            tick(len(outcomes) / len(cases))
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
    plan: Plan, cases: Sequence[Case], processes: int, *, with_records: bool
) -> Generator[tuple[Outcome, list[Record]], None, None]:
    """No more runs are begun than are soon taken: their requests would fill the memory."""
    waiting, others = iter(cases), set(active_children())
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_leave_interrupts) as pool:

        def begin(case: Case) -> Future[tuple[Outcome, list[Record]]]:
            return pool.submit(run_case, plan, case, with_records=with_records)

        running = [begin(case) for case in islice(waiting, processes + 1)]
        try:
            while running:
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
