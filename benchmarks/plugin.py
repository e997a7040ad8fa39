"""What the plug-in in the engine gives and costs, on real SGLang on this machine's CPU.

python -m benchmarks.plugin [--json] [--quick] [--runs 5] [--model tiny] [--only beside|mixed|long]
python -m benchmarks.plugin --held long|short [--only beside|mixed|steady]
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from backends.fleet.spec import FleetError
from benchmarks.plugin_beside import Colocation
from benchmarks.plugin_found import Effort, Found
from benchmarks.plugin_held import SHAPES, settings, told
from benchmarks.plugin_long import Displacement
from benchmarks.plugin_mixed import Mixed
from benchmarks.plugin_overhead import resting_us
from benchmarks.plugin_site import Site, standing
from benchmarks.plugin_steady import Steady
from benchmarks.report import Check, Report, Spread, command_line, reported


class Part(Protocol):
    async def measure(self) -> None: ...

    def tell(self, report: Report) -> None: ...


PARTS: dict[str, Callable[[Site, Effort, Found], Part]] = {
    "beside": Colocation,
    "mixed": Mixed,
    "long": Displacement,
    "steady": Steady,
}
SELECTING = ("beside", "mixed")
ALL, HELD = ("beside", "mixed", "long"), ("steady", "mixed", "beside")
"""Where nothing else is asked for: prompts are not held."""
HELD_HELP = (
    "decode steps last as long as a GPU's line says, scaled to this CPU, for long or short "
    "contexts; what they take beyond it is real. No measurement of a GPU (not held)"
)
AT_REST = "overhead of a step, mode all"


async def measured(model: str, effort: Effort, names: Sequence[str]) -> Report:
    report, found = Report(title="the plug-in in the engine, real SGLang on a CPU"), Found()
    shape = SHAPES.get(effort.held)
    async with standing(model, seed=11, **settings(shape) if shape else {}) as site:
        parts = {name: PARTS[name](site, effort, found) for name in names}
        for part in parts.values():
            await part.measure()
        state = await site.state()
    for part in parts.values():
        part.tell(report)
    faults = sum(feature["faults"] for feature in state["features"].values())
    report.checks.append(Check(name="faults of the plug-in", value=faults, target=0, unit=""))
    if any(name in SELECTING for name in names):
        _tell_selecting(report, state)
    if shape:
        report.title += ", steps held to a line"
        report.notes += told(shape, state["held"], state["held_late"])
    found.values[AT_REST] = resting_us(heard=True)
    found.values[f"{AT_REST}, no listener"] = resting_us(heard=False)
    report.checks.append(Check(name=AT_REST, value=found.median(AT_REST), target=5, unit="us"))
    report.spread |= {name: Spread.of(values) for name, values in found.values.items()}
    if effort.quick:
        report.notes.append("quick: one run, one target, one load, shorter ones")
    return report


def _tell_selecting(report: Report, state: dict[str, Any]) -> None:
    selecting_us = state["choosing_us"] / max(1, state["chosen_steps"])
    telling_us, of_cpu_us = (
        state[what] / max(1, state["steps"]) for what in ("reporting_us", "reporting_cpu_us")
    )
    name = "overhead of a step, selecting"
    report.checks.append(Check(name=name, value=selecting_us, target=150, unit="us"))
    report.notes.append(
        f"selecting: {state['views']:,} choices for {state['view_steps']:,} steps of fewer than "
        f"all; reports {telling_us:.1f} us a step in the engine, {of_cpu_us:.1f} us of it computing"
    )


def main() -> int:
    parser = command_line("plugin", __doc__)
    parser.add_argument("--runs", type=int, default=5, help="of each case (5)")
    parser.add_argument("--model", default="tiny", help="as slackwater fleet takes it (tiny)")
    parser.add_argument("--only", choices=PARTS, help="this part alone (a, b and c)")
    parser.add_argument("--held", choices=SHAPES, default="", help=HELD_HELP)
    asked = parser.parse_args()
    runs = 1 if asked.quick else asked.runs
    effort = Effort(runs=runs, quick=asked.quick, held=asked.held)
    names = [asked.only] if asked.only else [*(HELD if asked.held else ALL)]
    return reported(
        lambda: asyncio.run(measured(asked.model, effort, names)), FleetError, as_json=asked.json
    )


if __name__ == "__main__":
    sys.exit(main())
