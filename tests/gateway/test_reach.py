"""A controller whose actuator does not answer, and what is said each time it acts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from structlog.testing import capture_logs

from backends.actuators.settings import Webhook
from gateway.actuation import Actuation
from gateway.planning import Mode
from policies.demand import Demand, Fleet
from policies.ratio import Memory, Plan, Why
from policies.types import Role
from tests.gateway.actuated import FOUR, by, names, usable
from tests.gateway.gateway_under_test import Site, spec, standing
from tests.gateway.test_live_switching import answers
from tests.gateway.test_two_controllers import acting
from tests.gateway.test_webhook import Receiver, received

THREE_DECODES = (spec("p1", Role.PREFILL), *(spec(f"d{i}", Role.DECODE) for i in (1, 2, 3)))
AWAY = Webhook(url="http://127.0.0.1:9/none", answer_s=1.0, poll_s=1.0, within_s=60.0)


class OneDecode:
    """All the others are to prefill; it needs one more of each than there are."""

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        servers = fleet.prefills + fleet.decodes
        terms = {"need_prefills": servers, "need_decodes": 1}
        return memory, Plan(prefills=servers - 1, decodes=1, why=Why.SHORT_OF_PREFILL, terms=terms)


class Torn(OneDecode):
    """Wants something else at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        self.looks += 1
        memory, plan = super().next(memory, demand, fleet, now_us)
        return memory, replace(plan, prefills=plan.prefills - self.looks % 2)


class Content:
    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        terms = {"need_prefills": 1, "need_decodes": 1}
        plan = Plan(prefills=fleet.prefills, decodes=fleet.decodes, why=Why.HOLDS, terms=terms)
        return memory, plan


def wants(site: Site, policy: Any, **more: Any) -> None:
    planner = site.gateway.control._planner
    assert planner is not None
    planner.adopt(replace(planner.control, policy=policy, **more))


def lines(told: list[Any], event: str) -> list[Any]:
    return [it for it in told if it["event"] == event]


async def sample(site: Site, name: str) -> float:
    page = (await site.get("/metrics")).raw.decode()
    (line,) = [it for it in page.splitlines() if it.startswith(f"{name} ")]
    return float(line.split()[-1])


def live(webhook: Webhook) -> dict[str, Any]:
    told = acting(1000.0)
    ratio = by(Actuation.WEBHOOK, webhook=webhook, policy="dopd+", mode=Mode.ACT, interval_s=1.0)
    return {**told, "ratio": ratio}


@asynccontextmanager
async def looking(site: Site, for_s: float) -> AsyncIterator[None]:
    async with site.meanwhile(answers(site, round(for_s * 10), 10, 0.1)) as asking:
        yield
        await asking


async def test_no_server_is_emptied_for_a_service_that_does_not_answer() -> None:
    async with standing(THREE_DECODES, **live(AWAY)) as site:
        with capture_logs() as told:
            wants(site, OneDecode())
            async with looking(site, 8.0):
                for _ in range(70):
                    await asyncio.sleep(0.1)
                    assert usable(site) == names(THREE_DECODES)
            assert await sample(site, "slackwater_ratio_actuator_up") == 0
        assert lines(told, "role switch") == []
        assert [it["log_level"] for it in lines(told, "no server can be changed for now")] == [
            "warning"
        ]
        assert {it["acts"] for it in lines(told, "ratio")} == {False}


async def test_what_is_wanted_of_a_service_that_is_away_is_said_once_whatever_it_is() -> None:
    async with standing(THREE_DECODES, **live(AWAY)) as site:
        with capture_logs() as told:
            wants(site, Torn())
            async with looking(site, 12.0):
                pass
    assert [it["acts"] for it in lines(told, "ratio")] == [False]


@asynccontextmanager
async def asking(receiver: Receiver) -> AsyncIterator[tuple[Site, list[Any]]]:
    """A controller that acts, and is not content."""
    async with received(receiver, **{k: v for k, v in live(AWAY).items() if k != "ratio"}) as site:
        config = replace(site.config.ratio, policy="dopd+", mode=Mode.ACT, interval_s=1.0)
        with capture_logs() as told:
            site.gateway.adopt(replace(site.config, ratio=config))
            await answers(site, 15, 10, 0.1)
            wants(site, OneDecode())
            yield site, told


async def test_a_service_that_refuses_is_asked_less_and_less_often() -> None:
    """Each time empties a server; what it answers to a check says nothing of that."""
    async with asking(Receiver(refuses="no budget")) as (site, told):
        await asyncio.sleep(300.0)
        assert 3 <= len(lines(told, "role switch")) <= 5
        assert {it["worker"] for it in lines(told, "role switch")} == {"d1", "d2"}
        (refused,) = lines(told, "a change came to nothing")
        assert (refused["error"], refused["again_s"]) == ("no budget", 15.0)
        assert len(lines(told, "ratio")) <= 2 * len(lines(told, "role switch"))
        assert usable(site) == names(FOUR)


async def test_a_service_that_refuses_no_more_is_told_of_and_asked_at_once() -> None:
    receiver = Receiver(refuses="no budget")
    async with asking(receiver) as (site, told):
        await site.until("it is refused", lambda: lines(told, "a change came to nothing"))
        receiver.refuses = ""
        await site.until("done", lambda: lines(told, "changes are done again"), within_s=60.0)
        assert [it["outcome"] for it in lines(told, "role switch")] == ["failed", "done"]
        assert site.now_s() < 60.0


async def test_a_service_that_is_back_gets_what_was_wanted_meanwhile() -> None:
    receiver = Receiver(script=[(503, {})])
    async with asking(receiver) as (site, told):
        await site.until("it has changed", lambda: lines(told, "role switch"), within_s=60.0)
        events = [it["event"] for it in told]
        lost = events.index("no server can be changed for now")
        back = events.index("servers can be changed again")
        assert lost < back < events.index("role switch")
        assert [it["action"] for it in receiver.questions[:3]] == ["check", "check", "switch"]
        assert lines(told, "role switch")[0]["outcome"] == "done"


async def test_each_time_it_acts_it_says_so_once_after_a_reload_too() -> None:
    told_as = acting(1000.0)
    async with standing(THREE_DECODES, **told_as) as site:
        with capture_logs() as told:
            wants(site, OneDecode(), mode=Mode.ADVISE)
            async with looking(site, 4.0):
                pass
            assert [it["acts"] for it in lines(told, "ratio")] == [False]
            wants(site, OneDecode(), mode=Mode.ACT)
            await site.until("both have switched", lambda: len(lines(told, "role switch")) == 2)
            await asyncio.sleep(5.0)
        said = lines(told, "ratio")
        assert [it["acts"] for it in said] == [False, True]
        assert {name: said[1][name] for name in ("have", "wanted", "held")} == {
            "have": "1P3D",
            "wanted": "3P1D",
            "held": False,
        }


async def test_a_fleet_that_is_too_small_is_told_of_when_it_begins_and_when_it_ends() -> None:
    async with standing(THREE_DECODES, **acting(1000.0)) as site:
        with capture_logs() as told:
            wants(site, OneDecode(), mode=Mode.ADVISE)
            async with looking(site, 5.0):
                pass
            page = (await site.get("/metrics")).raw.decode()
            assert 'slackwater_ratio_servers{role="prefill",which="need"} 4.0' in page
            (small,) = lines(told, "the fleet is too small for its load")
            assert (small["need"], small["gpus"], small["log_level"]) == ("4P1D", 4, "warning")
            wants(site, Content())
            await asyncio.sleep(100.0)
        assert len(lines(told, "the fleet is too small for its load")) == 1
        assert len(lines(told, "the fleet is large enough again")) == 1


async def test_a_server_counts_as_one_of_its_new_role_when_it_serves_in_it() -> None:
    async with standing(THREE_DECODES, **acting(1000.0)) as site:
        control = site.gateway.control
        wants(site, Content(), mode=Mode.ADVISE)
        async with looking(site, 3.0):
            pass
        site.core.ledgers["d3"].switching = True
        had = [
            sample.value
            for metric in control.collect()
            for sample in metric.samples
            if sample.labels.get("which") == "had"
        ]
        site.core.ledgers["d3"].switching = False
        assert had == [1, 2]
