"""Role switches by whoever owns the processes: emulated servers, the real data path."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from gateway.actuation import Actuation
from gateway.config import ConfigError, Cost
from policies.events import SwitchWanted
from policies.types import Role
from tests.gateway.actuated import (
    FOUR,
    ScriptedOwner,
    by,
    names,
    overs,
    roles,
    switched,
    usable,
)
from tests.gateway.gateway_under_test import OFFLINE, Site, standing
from tests.gateway.test_live_switching import answers, whole

RELAUNCH = by(Actuation.RELAUNCH)


@asynccontextmanager
async def owned(**script: str) -> AsyncIterator[tuple[Site, ScriptedOwner]]:
    owners: list[ScriptedOwner] = []

    def owner(fleet: object) -> ScriptedOwner:
        owners.append(ScriptedOwner(fleet, script))  # type: ignore[arg-type]  # an EmulatedFleet
        return owners[0]

    async with standing(FOUR, ratio=RELAUNCH, relauncher=owner) as site:
        yield site, owners[0]


async def test_a_server_is_relaunched_in_its_new_role_while_requests_come() -> None:
    async with owned() as (site, owner):
        async with site.meanwhile(answers(site, 40, 40, 0.5, **OFFLINE)) as asking:
            await asyncio.sleep(1.0)
            assert await switched(site, "d2", Role.PREFILL) == [("done", "")]
            told = await asking
        assert all(whole(it, 40) for it in told)
        assert owner.asked == [("d2", Role.PREFILL)]
        assert roles(site)["d2"] == "prefill"
        assert {line["attempts"] for line in site.lines[-20:]} == {1}
        assert site.core.ledgers["d2"].dispatched > 0


async def test_the_time_that_a_relaunch_takes_is_told_with_it() -> None:
    async with owned() as (site, owner):
        async with overs(site) as lines:
            site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
            await asyncio.sleep(0.5)
        assert owner.took_s <= lines[0]["took_s"] - lines[0]["drained_s"] < owner.took_s + 1.0


@pytest.mark.parametrize(
    ("script", "outcome", "why"),
    [
        ("refuses", "failed", "there is no room for it"),
        ("comes back", "failed", "weights do not fit"),
        (
            "lies",
            "failed",
            "it is said to be done, and it is a decode server all the same",
        ),
        ("busy", "switched_by_another", "it is being started already"),
    ],
)
async def test_a_server_that_is_not_what_was_wanted_serves_on_as_what_it_is(
    script: str, outcome: str, why: str
) -> None:
    async with owned(d2=script) as (site, _):
        assert await switched(site, "d2", Role.PREFILL) == [(outcome, why)]
        assert roles(site)["d2"] == "decode"
        assert usable(site) == names(FOUR)
        told = await answers(site, 12, 30, 0.01)
        assert all(whole(it, 30) for it in told)
        assert {line["attempts"] for line in site.lines} == {1}


async def test_a_prefill_server_that_comes_back_as_one_pairs_at_once() -> None:
    """Decode servers hold a dead connection to what it was."""
    async with owned(p2="comes back") as (site, _):
        await answers(site, 12, 30, 0.001)
        assert (await switched(site, "p2", Role.DECODE))[0][0] == "failed"
        began = len(site.lines)
        await answers(site, 12, 30, 0.001)
        assert {line["attempts"] for line in site.lines[began:]} == {1}
        assert "p2" in {one.worker for one in site.sent[-24:]}


async def test_a_server_that_is_not_there_afterwards_stays_out() -> None:
    async with owned(d2="dies") as (site, _):
        (over,) = await switched(site, "d2", Role.PREFILL)
        assert over[0] == "does_not_answer"
        await asyncio.sleep(5.0)
        assert "d2" not in usable(site)
        assert (await site.serves()).status == 200


async def test_an_actuator_that_breaks_leaves_it_to_the_probe_what_the_server_is() -> None:
    async with owned(d2="breaks") as (site, _):
        assert await switched(site, "d2", Role.PREFILL) == [
            ("does_not_answer", "ZeroDivisionError: ")
        ]
        await site.until("it is found", lambda: usable(site) == names(FOUR))
        assert roles(site)["d2"] == "decode"


async def test_a_relaunch_that_hangs_is_told_of_and_its_server_stays_out() -> None:
    async with owned(d2="hangs") as (site, _):
        site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
        await asyncio.sleep(RELAUNCH.switch_s + 5.0)
        outcomes = site.gateway.control.switches.outcomes
        assert [outcome.value for outcome in outcomes] == ["hangs"]
        assert "d2" not in usable(site)
        assert (await site.serves()).status == 200
        ends_s = site.now_s()
    assert asyncio.get_running_loop().time() < ends_s + 20.0  # its end is not waited for


async def test_the_last_of_a_role_is_never_relaunched() -> None:
    async with owned() as (site, owner):
        await site.fleet.kill("d1")
        await site.until("d1 is out", lambda: "d1" not in usable(site))
        assert await switched(site, "d2", Role.PREFILL) == [("last_of_its_role", "")]
        assert owner.asked == []


async def test_without_a_fleet_there_is_nobody_to_relaunch() -> None:
    cost = Cost(model="Llama-3.1-8B", device="h100")
    with pytest.raises(ExceptionGroup) as caught:
        async with standing(FOUR, ratio=replace(RELAUNCH, policy="dopd+"), cost=cost):
            pass
    assert caught.group_contains(ConfigError, match="needs a fleet")
