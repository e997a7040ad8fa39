"""How much two windows of (b) differ that differ in nothing: stock beside stock."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.plugin_found import say
from benchmarks.plugin_mixed import Mixed
from benchmarks.report import Report, Spread
from policies.step_line import SeenStep


@dataclass(slots=True)
class Steady(Mixed):
    """In what the pairs of (b) find, so much is not the rule's."""

    @property
    def loads(self) -> tuple[float, ...]:
        return (1.0, 1.5)

    async def _pair(self, load: float, number: int, steps: list[SeenStep]) -> None:
        say(f"stock beside stock, {load:g} of the knee, run {number + 1} of {self.effort.runs}")
        first, second = [
            await self._ask("all", load, self.targets, steps, f"{number} {load}") for _ in "12"
        ]
        say(f"    {100 * first.met:.0f} and {100 * second.met:.0f} % met, {first.per_s:.0f} and")
        say(f"    {second.per_s:.0f} tokens/s")
        self.found.add(f"{load} steady won", 100 * (second.met - first.met))
        self.found.add(f"{load} steady speed", second.per_s / first.per_s)

    def tell(self, report: Report) -> None:
        for load in self.loads:
            won, speed = (
                Spread.of(self.found.values[f"{load} steady {what}"]) for what in ("won", "speed")
            )
            report.notes.append(
                f"stock beside itself at {load:g} of the knee: attainment {won} points, "
                f"tokens/s {speed}"
            )
