"""`python -m benchmarks.batch_crash`: a batch whose gateways, or servers, are killed over and over.

Each custom_id is in the output exactly once, with the answer of an undisturbed run, or a check
fails; what the kills have cost in tokens is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import postgres
from benchmarks.batch_site import OVER, BatchSite, faults_in, specs, standing, write_rows
from benchmarks.report import Check, Goal, Report, add_report_options

ENDPOINT = "/v1/completions"
PAIRS, SEATS = 2, 8
UNDISTURBED = "undisturbed"
LONGEST_LIFE_S = 3.0
"""From the start of a process to its kill, drawn evenly: some die before they listen."""
BATCH_S = 600.0
Tick = Callable[[int], object]
Killing = Callable[[BatchSite, str], Coroutine[Any, Any, list[float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one scenario has ended."""

    name: str
    status: str
    kills: int
    """While it ran."""
    lost: int
    doubled: int
    unknown: int
    failed: int
    different: int
    """Answers that are not those of an undisturbed run."""
    answer_tokens: int
    wasted_tokens: int
    took_s: float

    @property
    def wrong(self) -> int:
        return self.lost + self.doubled + self.unknown + self.failed + self.different


def bodies(rng: random.Random) -> Iterator[dict[str, Any]]:
    while True:
        words = " ".join(str(rng.randrange(1000)) for _ in range(rng.randint(5, 40)))
        yield {
            "model": "emulated",
            "prompt": words,
            "max_tokens": rng.randint(20, 120),
            "ignore_eos": True,
        }


def texts_in(lines: list[dict[str, Any]]) -> dict[str, str]:
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["text"]
        for line in lines
        if line["response"]
    }


def tokens_in(lines: list[dict[str, Any]]) -> int:
    return sum(line["response"]["body"]["usage"]["completion_tokens"] for line in lines)


class Scenario:
    """One batch, and somebody who kills."""

    def __init__(self, folder: Path, rows: int, kills: int, rng: random.Random) -> None:
        self.folder = folder
        self.rows = rows
        self.kills = kills
        self.rng = rng
        self.path = folder / "rows.jsonl"
        write_rows(self.path, rows, ENDPOINT, bodies(random.Random(7)))

    async def run(
        self,
        name: str,
        site: BatchSite,
        killing: Killing,
        expected: dict[str, str] | None,
    ) -> tuple[Outcome, dict[str, str]]:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        batch_id = await site.submit(self.path, ENDPOINT)
        killed_s = await killing(site, batch_id)
        batch = await site.over(batch_id, within_s=BATCH_S)
        output = await site.lines(batch, "output")
        errors = await site.lines(batch, "error")
        texts = texts_in(output)
        made, answered = site.generated_tokens(), tokens_in(output)
        outcome = Outcome(
            name=name,
            status=batch["status"],
            kills=sum(at_s <= (batch["completed_at"] or 0) for at_s in killed_s),
            **faults_in(self.rows, [*output, *errors]),
            failed=len(errors),
            different=0
            if expected is None
            else sum(texts.get(key) != text for key, text in expected.items()),
            answer_tokens=answered,
            wasted_tokens=made - answered,
            took_s=loop.time() - began_s,
        )
        return outcome, texts

    async def spare(self, site: BatchSite, batch_id: str) -> list[float]:
        """The undisturbed run."""
        return []

    def killing_gateways(self, tick: Tick) -> Killing:
        """Whatever a gateway does at that moment: starts, validates, runs rows, writes files."""

        async def kill(site: BatchSite) -> None:
            gateway = self.rng.choice(site.gateways)
            await gateway.kill()
            gateway.start()

        return self._killing(kill, tick, of=lambda site: len(site.gateways))

    def killing_servers(self, tick: Tick) -> Killing:
        async def kill(site: BatchSite) -> None:
            await site.kill_server(self.rng.choice(list(site.fleet.servers)))

        return self._killing(kill, tick, of=lambda site: 2)

    def _killing(
        self,
        kill: Callable[[BatchSite], Coroutine[Any, Any, None]],
        tick: Tick,
        of: Callable[[BatchSite], int],
    ) -> Killing:
        """When it was, by the calendar; not asked between all kills whether there is still
        something to kill for, since a gateway that must answer first dies less at random."""

        async def killing(site: BatchSite, batch_id: str) -> list[float]:
            killed_s: list[float] = []
            while len(killed_s) < self.kills:
                await asyncio.sleep(self.rng.uniform(0.0, LONGEST_LIFE_S / of(site)))
                killed_s.append(time.time())
                await kill(site)
                tick(1)
                if len(killed_s) % 10 == 0 and await _is_over(site, batch_id):
                    break
            return killed_s

        return killing


async def _is_over(site: BatchSite, batch_id: str) -> bool:
    return (await site.batch(batch_id))["status"] in OVER


async def run_all(rows: int, kills: int, seed: int, only: str, tick: Tick) -> list[Outcome]:
    """Rows take as long as the kills need: the fleet is as fast as that."""
    outcomes: list[Outcome] = []
    life_s = LONGEST_LIFE_S / 2
    seats = PAIRS * SEATS
    speed = max(0.2, rows / seats * 0.7 / max(1.0, 0.7 * kills * life_s))

    def fleet(factor: float) -> Any:
        return specs(PAIRS, speed=speed * factor, max_running=SEATS)

    async def scenario(
        name: str, factor: float, kill: str, expected: dict[str, str] | None, **more: Any
    ) -> dict[str, str]:
        with tempfile.TemporaryDirectory(prefix="slackwater-crash-") as folder:
            it = Scenario(Path(folder), rows, kills, random.Random(f"{seed} {name}"))
            killing = {
                "nobody": it.spare,
                "gateways": it.killing_gateways(tick),
                "servers": it.killing_servers(tick),
            }[kill]
            async with standing(Path(folder), fleet(factor), sections=SECTIONS, **more) as site:
                outcome, texts = await it.run(name, site, killing, expected)
        outcomes.append(outcome)
        return texts

    expected = await scenario(UNDISTURBED, 20.0, "nobody", None)
    if only in ("", "sqlite"):
        await scenario("gateway, SQLite", 1.0, "gateways", expected)
    if only in ("", "servers"):
        await scenario("servers", 1.0, "servers", expected)
    if only in ("", "postgresql") and postgres.is_installed():
        with postgres.running() as url:
            await scenario(
                "two gateways, PostgreSQL", 1.0, "gateways", expected, gateways=2,
                batch=f'database = "{url}"\nlease_s = 3.0',
            )  # fmt: skip
    return outcomes


SECTIONS = """
[policies]
pools = "none"
[telemetry]
poll_ms = 200.0
[breaker]
cooldown_ms = 200.0
cooldown_max_ms = 1000.0
"""


def report_of(outcomes: list[Outcome], rows: int, kills: int) -> Report:
    report = Report(title=f"a batch of {rows} rows under SIGKILL")
    table = Table(title="What the kills have cost", title_justify="left")
    for column in ("scenario", "status", "kills", "lost", "doubled", "failed", "different"):
        table.add_column(column, justify="left" if column in ("scenario", "status") else "right")
    for column in ("answers, tokens", "wasted, tokens", "wasted", "took"):
        table.add_column(column, justify="right")
    for it in outcomes:
        share = it.wasted_tokens / max(1, it.answer_tokens)
        table.add_row(
            it.name, it.status, *(f"{n:,}" for n in (it.kills, it.lost, it.doubled, it.failed)),
            f"{it.different:,}", f"{it.answer_tokens:,}", f"{it.wasted_tokens:,}",
            f"{share:.1%}", f"{it.took_s:.0f} s",
        )  # fmt: skip
        report.checks.append(
            Check(name=f"{it.name}: rows lost, doubled or wrong", value=it.wrong, target=0, unit="")
        )
    done = sum(one.status == "completed" for one in outcomes)
    fewest = min((it.kills for it in outcomes if it.name != UNDISTURBED), default=0)
    report.tables.append(table)
    report.checks.append(
        Check(
            name="batches completed",
            value=done,
            target=len(outcomes),
            unit="",
            goal=Goal.AT_LEAST,
        )
    )
    report.checks.append(
        Check(name="kills while it ran", value=fewest, target=kills, unit="", goal=Goal.AT_LEAST)
    )
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.batch_crash", description=__doc__)
    add_report_options(parser)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", choices=("sqlite", "postgresql", "servers"), default="", help="one scenario"
    )
    given = parser.parse_args(arguments)
    rows, kills = (150, 4) if given.quick else (given.rows, given.kills)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("kills", total=kills * (1 if given.only else 3))
        outcomes = uvloop.run(
            run_all(rows, kills, given.seed, given.only, lambda n: progress.advance(task, n))
        )
    report = report_of(outcomes, rows, kills)
    if not given.only and not postgres.is_installed():
        report.notes.append(postgres.LEFT_OUT)
    if given.quick:
        report.notes.append(f"shortened: {rows} rows and {kills} kills")
    return report.finish(as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
