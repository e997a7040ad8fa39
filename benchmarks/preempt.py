"""How fast offline work gives way, and what that costs.

Without --sglang: the gateway's CPU for a preemption and its resume, of the core alone and of the
whole process before emulated servers. With --sglang also, on real SGLang servers on this machine's
CPU: from the decision to the freed slot, an online prompt behind a long offline one, the pace of an
online chat beside offline work, and what is left on the servers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from math import ceil

from rich.table import Table

from backends.fleet.spec import FleetError
from benchmarks.preempt_cpu import core_us, spent
from benchmarks.preempt_sglang import FULL, QUICK, STEP_S, Found, measure
from benchmarks.processes import DidNotStart, Watch
from benchmarks.report import Check, Goal, Report, Spread, command_line, number

CORE_CYCLES, REQUESTS = 5000, 200
QUICK_CYCLES, QUICK_REQUESTS = 1000, 30


def quantile(ranked: Sequence[float], share: float) -> float:
    """The least value that so many of them do not exceed."""
    return ranked[max(0, ceil(share * len(ranked)) - 1)]


def cpu(report: Report, *, quick: bool) -> None:
    off, back = core_us(QUICK_CYCLES if quick else CORE_CYCLES)
    requests = QUICK_REQUESTS if quick else REQUESTS
    taking, beside = spent(1, requests), spent(2, requests)
    report.spread["core, a job is taken off, us of CPU"] = Spread.of(off)
    report.spread["core, it is back and goes again, us of CPU"] = Spread.of(back)
    both = [a + b for a, b in zip(off, back, strict=True)]
    table = Table(title="CPU of the gateway", title_justify="left")
    for column in ("", "median", "p99"):
        table.add_column(column, justify="right" if column else "left")
    ranked = sorted(both)
    cells = (quantile(ranked, 0.5), quantile(ranked, 0.99))
    table.add_row("core, one preemption and its resume, us", *map(number, cells))
    each_ms = (taking.cpu_ms - beside.cpu_ms) / max(1, taking.preemptions)
    table.add_row("process, one preemption and its resume, ms", number(each_ms), "-")
    table.add_row("process, an online request without one, ms", number(beside.each_ms), "-")
    report.tables.append(table)
    name = "online requests that took an offline one's seat"
    share = 100 * taking.preemptions / taking.requests
    report.checks.append(Check(name=name, value=share, target=90, unit="%", goal=Goal.AT_LEAST))
    report.checks.append(
        Check(name="preemptions where there was a seat", value=beside.preemptions, target=0,
              unit="")
    )  # fmt: skip
    report.notes.append(
        f"process: {requests} online requests to a decode server with one seat, which an offline "
        "request has, less the same with two seats; the relayed tokens of both are in it"
    )


def sglang(report: Report, found: Found) -> None:
    steps = sorted(it / found.step_s for it in found.freed_s)
    gaps = [quantile(sorted(it), 0.95) for it in (found.alone_s, found.beside_s)]
    report.spread["decision to freed slot, steps"] = Spread.of(steps)
    report.spread["resume, decision to next token, s"] = Spread.of(found.resumed_s)
    report.spread["first token behind a long offline prompt, s"] = Spread.of(found.behind_s)
    report.spread["first token, idle fleet, s"] = Spread.of(found.idle_s)
    report.spread["one chunk, s"] = Spread.of(found.chunk_s)
    behind_s = sorted(found.behind_s)[len(found.behind_s) // 2]
    chunk_s, idle_s = (sorted(it)[len(it) // 2] for it in (found.chunk_s, found.idle_s))
    checks = (
        ("decision to freed slot, median", quantile(steps, 0.5), 2.0, "steps"),
        ("decision to freed slot, p99", quantile(steps, 0.99), 3.0, "steps"),
        ("online prompt behind a long one: what it waits more", (behind_s - idle_s) / chunk_s, 2.0,
         "chunks"),
        ("online chat, p95 between tokens, above that without offline work",
         (gaps[1] / gaps[0] - 1) * 100, 20.0, "%"),
        ("requests left on any server", found.left, 0.0, ""),
        ("answers that are not whole", found.broken, 0.0, ""),
    )  # fmt: skip
    report.checks += [
        Check(name=name, value=value, target=target, unit=unit)
        for name, value, target, unit in checks
    ]
    report.checks.append(
        Check(name="preemptions behind the p99", value=len(steps), target=100, unit="",
              goal=Goal.AT_LEAST)
    )  # fmt: skip
    report.notes.append(
        f"real SGLang: tiny, 1 prefill and 2 decode servers on this CPU, each step {STEP_S * 1e3:g}"
        f" ms longer while slots and paces are measured: {found.step_s * 1e3:.1f} ms from token to "
        "token; a freed slot is seen by asking /v1/loads, which is in the figure"
    )
    report.notes.append(
        f"p95 between tokens: {gaps[0] * 1e3:.1f} ms alone ({len(found.alone_s)} gaps), "
        f"{gaps[1] * 1e3:.1f} ms with offline work ({len(found.beside_s)})"
    )


def main() -> int:
    parser = command_line("preempt", __doc__)
    parser.add_argument("--sglang", action="store_true", help="also on real SGLang servers")
    asked = parser.parse_args()
    report, watch = Report(title="preempt"), Watch.begin()
    try:
        cpu(report, quick=asked.quick)
        if asked.sglang:
            sglang(report, asyncio.run(measure(QUICK if asked.quick else FULL)))
    except (DidNotStart, FleetError) as problem:
        print(problem, file=sys.stderr)
        return 2
    if asked.quick:
        report.notes.append("--quick: fewer of everything, too few for a p99")
    report.notes.append(watch.note())
    return report.finish(as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
