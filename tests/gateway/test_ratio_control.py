from __future__ import annotations

import asyncio

from gateway.core import Core, Rules
from gateway.ratio_control import RatioControl
from policies.clock import VirtualClock
from policies.events import Outcome, SwitchOver
from policies.types import Role

SECOND = 1_000_000


def test_a_switch_that_hangs_and_then_ends_was_out_of_rotation_once() -> None:
    control = RatioControl(Core(Rules()), VirtualClock(), asyncio.TaskGroup())
    for outcome, took_s in ((Outcome.HANGS, 121), (Outcome.DONE, 150)):
        control.decided(0, SwitchOver("d1", Role.PREFILL, outcome, SECOND, took_s * SECOND))
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in control.collect()
        for sample in metric.samples
    }
    assert values["slackwater_role_switches_total", "hangs"] == 1
    assert values["slackwater_role_switch_seconds_total", "drain"] == 1
    assert values["slackwater_role_switch_seconds_total", "switch"] == 149
