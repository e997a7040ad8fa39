"""The line that benchmarks.plugin --held holds steps to."""

from __future__ import annotations

import pytest

from benchmarks.plugin_found import Effort, Found
from benchmarks.plugin_held import H100, SHAPES, settings, told
from benchmarks.plugin_mixed import KNEE, LOOSE_PROMPTS, TIGHT_PROMPTS, Mixed
from benchmarks.plugin_site import Site
from benchmarks.plugin_steady import Steady
from benchmarks.report import Report
from policies.constants import lookup
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import CostModel, build
from policies.shipped import SHIPPED


def cost() -> CostModel:
    model = model_named("Llama-3.1-8B")
    return build(model, device_named("h100"), lookup(SHIPPED, "h100", model.family, 1))


@pytest.mark.parametrize("count", [4, 8, 16, 32])
@pytest.mark.parametrize("context", [512, 2_048, 16_384])
def test_the_line_is_that_of_the_cost_model(count: int, context: int) -> None:
    expected_us = cost().decode(count, count * context).seconds * 1e6
    assert H100.step_us(count, count * context) == pytest.approx(expected_us, rel=0.08)


@pytest.mark.parametrize(("name", "share"), [("long", 0.5), ("short", 0.12)])
def test_so_much_of_a_step_at_the_knee_depends_on_contexts(name: str, share: float) -> None:
    tokens = KNEE * (sum(TIGHT_PROMPTS) + sum(LOOSE_PROMPTS)) // 2
    line = SHAPES[name].line
    assert line.token_us * tokens / line.step_us(2 * KNEE, tokens) == pytest.approx(share, abs=0.03)


def test_both_shapes_take_about_as_long_at_the_knee() -> None:
    tokens = KNEE * (sum(TIGHT_PROMPTS) + sum(LOOSE_PROMPTS)) // 2
    long_us, short_us = (shape.line.step_us(2 * KNEE, tokens) for shape in SHAPES.values())
    assert 38_000 < long_us < short_us < 1.15 * long_us


def test_a_server_is_told_the_line_and_people_what_it_stands_for() -> None:
    shape = SHAPES["long"]
    assert settings(shape) == {
        "held_base_us": 3 * H100.base_us,
        "held_request_us": 3 * H100.request_us,
        "held_token_us": 24 * H100.token_us,
    }
    assert "5.0% of them longer by themselves" in told(shape, 200, 10)[1]


def test_windows_are_longer_where_steps_are_held() -> None:
    site = Site.__new__(Site)
    held = Mixed(site, Effort(runs=1, held="long"), Found())
    assert held.seconds > Mixed(site, Effort(runs=1), Found()).seconds > 0


def test_stock_beside_itself_is_told_and_nothing_is_checked() -> None:
    part, report = Steady(Site.__new__(Site), Effort(runs=2), Found()), Report(title="")
    for load in part.loads:
        for won, speed in ((1.0, 0.99), (-2.0, 1.02)):
            part.found.add(f"{load} steady won", won)
            part.found.add(f"{load} steady speed", speed)
    part.tell(report)
    assert (len(report.notes), report.checks) == (2, [])
    assert "-2" in report.notes[0]
