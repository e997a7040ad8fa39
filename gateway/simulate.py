"""`slackwater simulate`: what a fleet would do with a workload, before anybody buys it."""

from __future__ import annotations

import argparse
import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from backends.words import in_words
from gateway import terminal
from gateway.settings import ConfigError
from gateway.simulation.asks import prepared
from gateway.simulation.moves import idle_note
from gateway.simulation.page import page
from gateway.simulation.plan import Plan, load
from gateway.simulation.progress import shown
from gateway.simulation.runs import Outcome, cases_of, run_all
from gateway.simulation.show import show_outcome
from gateway.simulation.summary import Row, left_out, notes_of, rows_of
from gateway.simulation.targets import RequestLog, check_page, write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenario", type=Path, metavar="SCENARIO.toml")
    parser.add_argument("--data", type=Path, help="where traces and tables lie (default: as the "
                        "scenario says, beside it)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--log", type=Path, metavar="FOLDER", help="write every request: "
                        "requests.csv, runs.csv")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots")
    parser.add_argument("--processes", type=int, help="runs at the same time "
                        "(default: one for each core)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run_simulate(given: argparse.Namespace, console: Console | None = None) -> int:
    out = console or terminal.console()
    try:
        if given.processes is not None and given.processes < 1:
            raise ConfigError(f"--processes must be at least 1, got {given.processes}")
        plan = load(given.scenario, given.data)
        if given.html is not None:
            check_page(given.html)
        outcomes, trouble = _run(given, plan)
    except (ConfigError, OSError) as error:
        return _refuse(in_words(error), 2)
    except BrokenProcessPool:
        return _refuse("a process ended in the middle of its run; is there enough memory?", 1)
    rows, notes = rows_of(outcomes), notes_of(outcomes)
    notes += [note for it in plan.scenario.policy for note in idle_note(it.name, it.ratio)]
    if given.json:
        out.file.write(orjson.dumps(answer(plan, rows, outcomes, notes)).decode() + "\n")
    else:
        show_outcome(out, rows, notes)
    out.file.flush()
    if given.html is not None:
        trouble.append(write_page(given.html, page(plan, rows, outcomes, notes)))
    told = "; ".join(filter(None, trouble))
    return _refuse(told, 2) if told else 0


def answer(
    plan: Plan, rows: list[Row], outcomes: list[Outcome], notes: list[str]
) -> dict[str, Any]:
    """The same names as in the tables of the documentation."""
    scenario = plan.scenario
    return {
        "scenario": scenario.name,
        "seeds": scenario.seeds,
        "warm_up_s": scenario.warm_up_s,
        "swept": scenario.sweep.of,
        "summary": [asdict(row) for row in rows],
        "runs": [
            asdict(it.facts)
            | {"workloads": [asdict(figures) for figures in it.figures]}
            | {"switches": [asdict(moved) for moved in it.moves]}
            for it in outcomes
        ],
        "left_out": left_out(outcomes),
        "notes": notes,
    }


def _run(given: argparse.Namespace, plan: Plan) -> tuple[list[Outcome], list[str]]:
    """With what went wrong beside the runs."""
    first = cases_of(plan)[0]
    prepared(plan, first.load, first.seed)  # what is wrong with the workload is said at once
    log = RequestLog(given.log) if given.log is not None else None
    processes = os.cpu_count() or 1 if given.processes is None else given.processes
    with shown(Console(stderr=True), quiet=given.quiet or given.json) as tick:
        try:
            keep = None if log is None else log.write
            outcomes = run_all(plan, processes=processes, keep=keep, tick=tick)
        finally:
            if log is not None:
                log.close()
    return outcomes, [] if log is None else [log.trouble]


def _refuse(why: str, status: int) -> int:
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"slackwater simulate: {why}", style="red", markup=False, highlight=False)
    return status
