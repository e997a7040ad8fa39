"""Steps that are held to a line, by sleeping: the shape is a GPU's, the scale is this CPU's.

The line is that of the measured step times of Llama-3.1-8B in bf16 on one H100 under SGLang 0.5.14
(as policies/roofline has it; a test compares). What a step takes beside it is real: the scheduler,
who joins, views, the choice itself. It is scaled up to some 1.8 times of what the CPU takes itself
at the knee of (b), so that the sleep covers what other work does to the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.step_line import StepLine

H100 = StepLine(base_us=6_470.0, request_us=8.0, token_us=0.0424)
"""Llama-3.1-8B, one H100, up to some 64 requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    stands_for: int
    """Tokens on the device, of one token of context here."""
    slower: float
    """Than the device."""

    @property
    def line(self) -> StepLine:
        base_us, request_us, token_us = (self.slower * term for term in H100)
        return StepLine(base_us, request_us, self.stands_for * token_us)


SHAPES = {
    "long": Shape(stands_for=8, slower=3.0),
    "short": Shape(stands_for=1, slower=6.0),
}
"""Half of a step at the knee of (b) depends on contexts (1,600 to 29,000 tokens), and an eighth
(200 to 3,600)."""


def settings(shape: Shape) -> dict[str, float]:
    """What a server is told."""
    return {f"held_{name}": value for name, value in shape.line._asdict().items()}


def told(shape: Shape, held: int, late: int) -> list[str]:
    line = shape.line
    return [
        f"steps held to {line.base_us:.0f} us + {line.request_us:.0f} us a request + "
        f"{line.token_us * 1000:.0f} us for 1,000 tokens of context: Llama-3.1-8B on one H100, "
        f"{shape.slower:g} times as long, each token of context for {shape.stands_for}",
        f"{held:,} steps held, {late / max(1, held):.1%} of them longer by themselves",
    ]
