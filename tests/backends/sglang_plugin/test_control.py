"""What a gateway may set, what it may not, and what is told of a request."""

from __future__ import annotations

import math
from math import inf
from typing import Any

import pytest

from backends.sglang_plugin.control import Control, Refused, Setting, adjusted, setting_of
from backends.sglang_plugin.riders import rider_of
from policies.step_line import StepLine
from tests.backends.sglang_plugin.fakes import request


def told(**values: Any) -> dict[str, Any]:
    return {f"slackwater_{name}": value for name, value in values.items()}


def test_what_is_not_named_stays_as_it_was() -> None:
    first = adjusted(Control(), setting_of(told(mode=2, tpot_us=40_000), drill=False), 0.0)
    second = adjusted(first, setting_of(told(hold_steps=8), drill=False), 0.0)
    assert (second.mode, second.tpot_us, second.valves.hold_steps) == ("slack", 40_000, 8)
    assert second.until_us == inf


def test_a_line_is_set_and_taken_back() -> None:
    set_ = adjusted(Control(), Setting(base_us=900.0, token_us=0.01), 0.0)
    assert set_.line == StepLine(900.0, 0.0, 0.01)
    assert adjusted(set_, Setting(base_us=0.0, request_us=0.0, token_us=0.0), 0.0).line is None


def test_a_lease_counts_from_now() -> None:
    assert adjusted(Control(), Setting(lease_s=2.0), 1e6).until_us == 3e6


@pytest.mark.parametrize(
    "values",
    [
        told(speed=1),
        told(mode=7),
        told(mode="slack"),
        told(mode=True),
        told(hold_steps=0),
        told(tpot_us=-1),
        told(tpot_us=math.nan),
        told(tpot_us=inf),
        told(mode=90),
    ],
)
def test_nonsense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="slackwater_"):
        setting_of(values, drill=False)


def test_the_drill_is_for_those_who_asked_for_it() -> None:
    assert setting_of(told(mode=90), drill=True).mode == 90


@pytest.mark.parametrize(
    ("custom", "read", "nonsense"),
    [
        (None, (True, 0.0), 0),
        ({"slackwater_class": "offline"}, (False, 0.0), 0),
        ({"slackwater_class": "online", "slackwater_tpot_ms": 40}, (True, 40_000.0), 0),
        ({"slackwater_class": "urgent"}, (True, 0.0), 1),
        ({"slackwater_class": ["offline"]}, (True, 0.0), 1),
        ({"slackwater_tpot_ms": "soon"}, (True, 0.0), 1),
        ({"slackwater_tpot_ms": True}, (True, 0.0), 1),
        ({"slackwater_tpot_ms": -3}, (True, 0.0), 1),
        ({"slackwater_tpot_ms": math.nan}, (True, 0.0), 1),
        ({"mine": 1}, (True, 0.0), 0),
        ("text", (True, 0.0), 0),
    ],
)
def test_nonsense_of_a_request_counts_as_untold(
    custom: object, read: tuple[bool, float], nonsense: int
) -> None:
    rider = rider_of(request("r", told=custom), 1.0)
    assert (rider.is_online, rider.tpot_us) == read
    assert rider.is_nonsense == nonsense
