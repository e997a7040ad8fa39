from __future__ import annotations

import asyncio
import random
from dataclasses import replace

from backends.actuators.settings import Webhook
from gateway.actuation import Actuation
from gateway.check import inspect
from gateway.config import RatioSettings
from gateway.planning import Mode
from gateway.ratio_notes import ratio_notes
from gateway.suitability import Level
from policies.types import Worker
from tests.gateway.gateway_under_test import PAIR
from tests.gateway.talk import decode, prefill
from tests.gateway.test_check import fleet_of

FLEET = [prefill("p1"), prefill("p2"), decode("d1"), decode("d2")]
ACTS = RatioSettings(policy="dopd+", mode=Mode.ACT)


def subjects(ratio: RatioSettings, workers: list[Worker] | None = None) -> list[str]:
    found = ratio_notes(ratio, FLEET if workers is None else workers)
    assert {one.level for one in found} <= {Level.NOTE}
    return [one.subject for one in found]


def test_a_controller_that_can_do_what_it_is_told_is_not_spoken_of() -> None:
    assert subjects(RatioSettings()) == []
    assert subjects(ACTS) == []


def test_settings_that_do_nothing_are_named() -> None:
    assert subjects(RatioSettings(mode=Mode.ACT)) == ["ratio.mode"]
    assert subjects(replace(ACTS, budget_gpus=8)) == ["ratio.budget_gpus"]
    assert subjects(replace(ACTS, budget_gpus=8, actuator=Actuation.RAY, switch_s=900.0)) == []


def test_a_change_that_may_take_longer_than_a_switch_is_named() -> None:
    hooked = replace(ACTS, actuator=Actuation.WEBHOOK)
    assert subjects(hooked) == ["ratio.switch_s"]
    assert subjects(replace(hooked, switch_s=600.0)) == []
    assert subjects(replace(hooked, webhook=Webhook(within_s=60.0))) == []


def test_the_only_server_of_a_role_is_named_where_roles_are_switched() -> None:
    assert subjects(ACTS, FLEET[:3]) == ["d1"]
    assert subjects(replace(ACTS, mode=Mode.ADVISE), FLEET[:3]) == []


async def test_a_check_says_it() -> None:
    async with fleet_of(PAIR) as (_, config):
        ratio = RatioSettings(mode=Mode.ACT)
        clock, rng = asyncio.get_running_loop(), random.Random(3)
        report = await inspect(replace(config, ratio=ratio), clock, rng, 5.0)
    assert report.ok
    assert "ratio.mode" in {one.subject for one in report.findings}
