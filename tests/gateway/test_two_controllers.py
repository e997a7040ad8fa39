"""Roles that somebody else changes, and what a server needs to be found in its new one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from structlog.testing import capture_logs

from backends.actuators.sglang import SglangTurn
from gateway.app import Gateway
from gateway.config import Cost, RatioSettings
from gateway.planning import Mode
from policies.demand import Demand, Fleet
from policies.events import Outcome, SwitchWanted
from policies.ratio import Memory, Plan, Why
from policies.types import Role
from tests.gateway.gateway_under_test import QUICK, Site, entry_of, generate, spec, standing
from tests.gateway.test_live_switching import BUSY_PREFILLS, answers, roles

TWO_PAIRS = tuple(
    spec(f"{role.value}{i}", role) for role in (Role.PREFILL, Role.DECODE) for i in (1, 2)
)
BLIND = replace(QUICK.telemetry, poll_ms=8_000.0)
"""For seconds the gateway knows no role but from its own switches."""


async def somebody_else_switches(site: Site, name: str, role: str) -> None:
    body = {"new_role": role, "decode_cuda_graph_memory_gb": 0}
    async with site.http.post(site.fleet[name].url + "/pd_role_switch", json=body) as answer:
        assert (await answer.json())["success"] is True


@asynccontextmanager
async def switches_told(site: Site) -> AsyncIterator[list[str]]:
    """How those ended that were begun in this block."""
    outcomes: list[str] = []
    with capture_logs() as told:
        yield outcomes
        await site.until("no move", lambda: not site.core.switching.moves)
        outcomes += [str(it["outcome"]) for it in told if it["event"] == "role switch"]


def switches_asked(site: Site) -> list[str]:
    return [name for name, page in site.calls if page == "/pd_role_switch"]


async def switched(site: Site, name: str, role: Role) -> None:
    site.gateway.driver.post(SwitchWanted(name, role, "asked for"))
    await site.until(f"{name} has switched", lambda: roles(site)[name] == role.value)


async def test_a_server_switched_there_and_back_loses_no_pair() -> None:
    """A decode server that met it before has a dead connection to its old name."""
    async with standing(TWO_PAIRS, telemetry=BLIND) as site:
        await answers(site, 12, 30, 0.001)
        await switched(site, "prefill2", Role.DECODE)
        await switched(site, "prefill2", Role.PREFILL)
        began = len(site.lines)
        await answers(site, 12, 30, 0.001)
        assert {line["attempts"] for line in site.lines[began:]} == {1}
        assert "prefill2" in {one.worker for one in site.sent[-24:]}


async def test_a_decode_server_becomes_a_prefill_server_that_pairs_at_once() -> None:
    async with standing(TWO_PAIRS, telemetry=BLIND) as site:
        await switched(site, "decode2", Role.PREFILL)
        await answers(site, 12, 30, 0.001)
        assert {line["attempts"] for line in site.lines} == {1}
        assert "decode2" in {one.worker for one in site.sent}


async def test_a_prefill_server_needs_a_size_of_graphs_to_become_a_decode_server() -> None:
    ratio = RatioSettings(decode_cuda_graph_memory_gb=1.5)
    async with standing(TWO_PAIRS, ratio=ratio) as site:
        await switched(site, "prefill2", Role.DECODE)
        assert switches_asked(site) == ["prefill2"]
        turn = site.gateway._actuator.turn
        assert isinstance(turn, SglangTurn)
        assert turn.graph_memory_gb == 1.5


async def test_a_server_that_somebody_else_has_switched_is_not_asked() -> None:
    async with standing(TWO_PAIRS, telemetry=BLIND) as site:
        await somebody_else_switches(site, "decode2", "prefill")
        async with switches_told(site) as outcomes:
            site.gateway.driver.post(SwitchWanted("decode2", Role.PREFILL, "asked for"))
            await asyncio.sleep(0.5)
        assert outcomes == ["switched_by_another"]
        assert switches_asked(site) == []
        assert roles(site)["decode2"] == "prefill"
        await site.serves()


async def test_two_hands_do_not_take_the_last_of_a_role() -> None:
    """The books still have a second decode server."""
    async with standing(TWO_PAIRS, telemetry=BLIND) as site:
        await somebody_else_switches(site, "decode2", "prefill")
        async with switches_told(site) as outcomes:
            site.gateway.driver.post(SwitchWanted("decode1", Role.PREFILL, "asked for"))
            await asyncio.sleep(0.5)
        assert outcomes == ["failed"]
        assert switches_asked(site) == []
        assert roles(site)["decode1"] == "decode"


def acting(lease_s: float) -> dict[str, Any]:
    online = replace(QUICK.classes.online, ttft_ms=500.0, tpot_ms=9.0, patience=100.0)
    return {
        "classes": replace(QUICK.classes, online=online),
        "cost": Cost(model="Llama-3.1-8B", device="h100"),
        "ratio": RatioSettings(policy="dopd+", mode=Mode.ACT, interval_s=1.0, lease_s=lease_s),
    }


class OnePrefill:
    """All the others are to decode."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        servers = fleet.prefills + fleet.decodes
        return memory, Plan(prefills=1, decodes=servers - 1, why=Why.SHORT_OF_DECODE)


async def switches_after_a_foreign_one(lease_s: float) -> list[str]:
    async with standing(BUSY_PREFILLS, **acting(lease_s)) as site:
        planner = site.gateway.control._planner
        assert planner is not None
        await asyncio.sleep(1.0)
        await somebody_else_switches(site, "p3", "decode")
        await site.until("it is seen", lambda: roles(site)["p3"] == "decode")
        await asyncio.sleep(1.0)
        planner.adopt(replace(planner.control, policy=OnePrefill()))
        await asyncio.sleep(3.0)
        return switches_asked(site)


async def test_a_controller_stands_back_while_somebody_else_changes_roles() -> None:
    assert await switches_after_a_foreign_one(lease_s=1000.0) == []
    assert await switches_after_a_foreign_one(lease_s=0.0) == ["p2"]


async def test_its_own_switches_do_not_hold_a_controller_back() -> None:
    async with standing(BUSY_PREFILLS, **acting(1000.0)) as site:
        site.gateway.driver.post(SwitchWanted("p3", Role.DECODE, "asked for"))
        await asyncio.sleep(3.0)
        assert roles(site)["p3"] == "decode"
        planner = site.gateway.control._planner
        assert planner is not None
        assert planner.others.until_us == 0
        assert (await site.ask("/generate", generate(4))).status == 200


async def test_a_role_that_somebody_else_has_emptied_gets_a_server_in_spite_of_the_lease() -> None:
    async with standing(BUSY_PREFILLS, **acting(1000.0)) as site:
        planner = site.gateway.control._planner
        assert planner is not None
        await asyncio.sleep(1.5)
        told = await answers(site, 20, 10, 0.05)
        await somebody_else_switches(site, "d1", "prefill")
        await site.until("it is seen", lambda: roles(site)["d1"] == "prefill")
        began_s = site.now_s()
        await site.until("a role is filled", lambda: "decode" in roles(site).values())
        assert site.now_s() - began_s < 5.0
        assert planner.others.until_us > 0
        assert all(it.status == 200 for it in told)


async def test_a_gateway_that_comes_back_after_its_own_switches_acts() -> None:
    """What it finds is where it begins, whatever its configuration says; so is what comes later."""
    found = {"p3": {"role": Role.DECODE}}
    known = [it.engine.name for it in BUSY_PREFILLS if it.engine.name != "p2"]
    async with standing(BUSY_PREFILLS, workers=known, entries=found, **acting(1000.0)) as site:
        planner = site.gateway.control._planner
        assert planner is not None
        entry = entry_of(site.fleet["p2"], role=Role.DECODE)
        config = replace(site.config, worker=(*site.config.worker, entry))
        site.gateway.adopt(config)
        await asyncio.sleep(3.0)
        assert roles(site) == {"p1": "prefill", "p2": "prefill", "p3": "prefill", "d1": "decode"}
        assert planner.others.until_us == 0
        planner.adopt(replace(planner.control, policy=OnePrefill()))
        await answers(site, 20, 10, 0.05)
        await site.until("it acts", lambda: list(roles(site).values()).count("decode") == 3)


@asynccontextmanager
async def beside(site: Site) -> AsyncIterator[Site]:
    """Another gateway over the same servers."""
    async with asyncio.TaskGroup() as tasks:
        loop = asyncio.get_running_loop()
        gateway = Gateway(site.config, loop, random.Random(11), tasks, lambda _: None)
        await gateway.start()
        try:
            yield replace(site, gateway=gateway)
        finally:
            await gateway.close()


async def test_of_two_that_act_at_once_one_at_most_goes_on_and_nothing_is_lost() -> None:
    many = (*(spec(f"p{i}", Role.PREFILL, kv_tokens=6_000) for i in range(5)), BUSY_PREFILLS[-1])
    async with standing(many, **acting(1000.0)) as site, beside(site) as other:
        await asyncio.sleep(1.0)
        async with (
            site.meanwhile(answers(site, 60, 150, 0.1)) as one,
            other.meanwhile(answers(other, 60, 150, 0.1)) as two,
        ):
            for _ in range(80):
                await asyncio.sleep(0.1)
                held = {it.engine.role for it in site.fleet.servers.values()}
                assert held == {Role.PREFILL, Role.DECODE}
            told = await one + await two
        assert [it.status for it in told] == [200] * 120
        controls = [it.gateway.control for it in (site, other)]
        done = [control.switches.outcomes.get(Outcome.DONE, 0) for control in controls]
        assert 1 <= sum(done) <= 2
        assert any(control._planner.others.until_us for control in controls if control._planner)
