"""Servers that are pods of two workloads: a scripted API server, emulated servers, virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from backends.actuators.settings import Kubernetes
from gateway.actuation import Actuation
from gateway.config import ConfigError, Cost
from gateway.planning import Mode
from policies.demand import Demand, Fleet
from policies.events import SwitchWanted
from policies.ratio import Memory, Plan, Why
from policies.types import Pool, Role
from tests.gateway.actuated import FOUR, by, names, roles, switched, usable
from tests.gateway.gateway_under_test import OFFLINE, Site, spec, standing
from tests.gateway.scripted_cluster import NAMES, NAMESPACE, ScriptedCluster, serving
from tests.gateway.test_live_switching import answers, whole

RUNNING = {it.engine.name: it.engine.role for it in FOUR}
FLEET = (*FOUR, spec("x1", Role.PREFILL), spec("x2", Role.PREFILL))


@asynccontextmanager
async def clustered(
    cluster: ScriptedCluster,
    folder: Path,
    running: dict[str, Role] | None = None,
    *,
    control: dict[str, Any] | None = None,
    cost: Cost | None = None,
    **more: Any,
) -> AsyncIterator[Site]:
    async with serving(cluster, folder) as kubeconfig:
        told: dict[str, Any] = {
            "prefill": NAMES[Role.PREFILL],
            "decode": NAMES[Role.DECODE],
            "namespace": NAMESPACE,
            "kubeconfig": str(kubeconfig),
            "start_s": 60.0,
        }
        where = Kubernetes(**told | more)
        ratio = by(Actuation.KUBERNETES, switch_s=200.0, kubernetes=where, **control or {})
        specs = FLEET if running is None else tuple(spec(it, running[it]) for it in running)
        async with standing(specs, workers=(), ratio=ratio, cost=cost or Cost()) as site:
            await cluster.adopt(site.fleet, RUNNING if running is None else running)
            await site.until("all serve", lambda: usable(site) == set(cluster.pods))
            yield site


async def test_pods_are_servers_while_they_are_ready(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path) as site:
        assert roles(site) == {name: role.value for name, role in RUNNING.items()}
        assert {it.worker.pool for it in site.core.ledgers.values()} == {Pool.RELAXED}
        cluster.replicas[Role.DECODE] += 1
        cluster.settle()
        await site.until("it has come", lambda: "x1" in usable(site), within_s=30.0)
        cluster.replicas[Role.DECODE] -= 2
        cluster.settle()
        await site.until("two have gone", lambda: len(site.core.ledgers) == 3)
        assert (await site.serves()).status == 200


async def test_a_pod_that_is_back_under_its_name_elsewhere_is_found_there(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path) as site:
        elsewhere = site.fleet["x1"]
        await cluster._revive("x1")
        elsewhere.engine.machine.take_role(Role.DECODE)
        pod = cluster.pods["d2"]
        pod.url_port, pod.bootstrap_port = elsewhere.port, elsewhere.bootstrap_port
        url = elsewhere.url
        await site.until("it is found", lambda: site.core.ledgers["d2"].worker.url == url)
        await site.until("it serves", lambda: "d2" in usable(site))


class Amnesiac(ScriptedCluster):
    """Takes no word on the lease once both numbers have changed."""

    def _of_leases(self, method: str, body: Any) -> web.StreamResponse:
        if method == "PUT" and len(self.scaled) == 2:
            return web.json_response({"message": "etcd is away"}, status=503)
        return super()._of_leases(method, body)


async def test_a_change_that_is_made_is_done_whether_or_not_it_can_be_noted(tmp_path: Path) -> None:
    async with clustered(Amnesiac(), tmp_path) as site:
        assert await switched(site, "d1", Role.PREFILL) == [("done", "")]
        assert roles(site) == {"d2": "decode", "p1": "prefill", "p2": "prefill", "x1": "prefill"}


async def test_a_pod_of_the_other_role_comes_in_the_place_of_the_one_that_was_emptied(
    tmp_path: Path,
) -> None:
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path) as site:
        async with site.meanwhile(answers(site, 60, 40, 0.5, **OFFLINE)) as asking:
            await asyncio.sleep(1.0)
            assert await switched(site, "d1", Role.PREFILL) == [("done", "")]
            told = await asking
        assert all(whole(it, 40) for it in told)
        assert cluster.scaled == [("decode", 1), ("prefill", 3)]
        assert roles(site) == {"d2": "decode", "p1": "prefill", "p2": "prefill", "x1": "prefill"}
        await site.until("it serves", lambda: "x1" in usable(site))
        assert {line["attempts"] for line in site.lines[-10:]} == {1}


async def test_roles_of_a_group_are_scaled_alike(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path, group="sglang") as site:
        assert await switched(site, "d1", Role.PREFILL) == [("done", "")]
        assert cluster.scaled == [("decode", 1), ("prefill", 3)]
        assert "x1" in roles(site)


async def test_a_pod_that_does_not_start_brings_both_numbers_back(tmp_path: Path) -> None:
    cluster = ScriptedCluster(crashes={Role.PREFILL})
    async with clustered(cluster, tmp_path) as site:
        ((outcome, why),) = await switched(site, "d1", Role.PREFILL)
        assert outcome == "failed"
        assert why == "no prefill server within 60 s: x1 is not ready: CrashLoopBackOff"
        assert cluster.scaled == [("decode", 1), ("prefill", 3), ("prefill", 2), ("decode", 2)]
        await site.until("there is one again", lambda: len(usable(site)) == 4, within_s=60.0)
        assert sorted(roles(site).values()) == ["decode", "decode", "prefill", "prefill"]


async def test_a_pod_that_comes_up_in_the_wrong_role_is_used_as_what_it_is(tmp_path: Path) -> None:
    cluster = ScriptedCluster(wrong={Role.PREFILL})
    async with clustered(cluster, tmp_path) as site:
        assert await switched(site, "d1", Role.PREFILL) == [("failed", "")]
        await site.until("it serves", lambda: "x1" in usable(site))
        assert roles(site)["x1"] == "decode"


async def test_a_cluster_that_does_not_give_a_pod_up_keeps_its_number(tmp_path: Path) -> None:
    cluster = ScriptedCluster(ignores=True)
    async with clustered(cluster, tmp_path) as site:
        ((outcome, why),) = await switched(site, "d1", Role.PREFILL)
        assert (outcome, why) == ("failed", "the cluster has not given it up within 30 s")
        assert cluster.scaled == [("decode", 1), ("decode", 2)]
        assert cluster.pods["d1"].cost == 0
        assert usable(site) == names(FOUR)


async def test_a_pod_that_the_cluster_would_not_choose_is_left_alone(tmp_path: Path) -> None:
    cluster = ScriptedCluster(owner="StatefulSet")
    running = {f"{role.value}-{i}": role for role in NAMES for i in range(3)}
    async with clustered(cluster, tmp_path, running) as site:
        ((outcome, why),) = await switched(site, "decode-1", Role.PREFILL)
        assert outcome == "failed"
        assert why == "a StatefulSet gives up its last pod first, which decode-1 is not"
        assert cluster.scaled == []
        cluster.owner = "ReplicaSet"
        cluster.pods["decode-0"].ready = False
        ((outcome, why),) = await switched(site, "decode-1", Role.PREFILL)
        assert why == "the cluster would give up decode-0 first, which is not ready"
        assert cluster.scaled == []


def held_by(holder: str, plan: str = "") -> dict[str, Any]:
    return {
        "metadata": {"name": "slackwater", "annotations": {"slackwater.io/change": plan}},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 30},
    }


async def test_who_has_not_the_lease_changes_nothing(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    cluster.hold(held_by("another gateway"))
    async with clustered(cluster, tmp_path) as site:
        over = await switched(site, "d1", Role.PREFILL)
        assert over == [("switched_by_another", "another gateway has the lease")]
        assert cluster.scaled == []
        assert usable(site) == names(FOUR)


async def test_a_holder_that_is_silent_has_lost_it(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    cluster.hold(held_by("a dead gateway"))
    async with clustered(cluster, tmp_path) as site:
        await asyncio.sleep(15.0)
        cluster.hold(cluster.lease)  # it was alive: 30 s from here
        await asyncio.sleep(25.0)
        assert (await switched(site, "d1", Role.PREFILL))[0][0] == "switched_by_another"
        await asyncio.sleep(10.0)
        assert await switched(site, "d1", Role.PREFILL) == [("done", "")]
        assert cluster.lease["spec"]["holderIdentity"] != "a dead gateway"
    assert cluster.lease["spec"]["holderIdentity"] == ""


async def test_a_lost_lease_stops_a_change_before_it_has_begun(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path) as site:
        assert await switched(site, "d1", Role.PREFILL) == [("done", "")]
        cluster.hold(held_by("a faster gateway"))
        over = await switched(site, "p1", Role.DECODE)
        assert over == [("switched_by_another", "a faster gateway has the lease")]


async def test_what_a_dead_gateway_has_begun_is_finished_first(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    cluster.hold(held_by("", '{"to": "prefill", "prefill": 2, "decode": 3}'))
    async with clustered(cluster, tmp_path) as site:
        ((_, why),) = await switched(site, "p1", Role.DECODE)
        assert why == "the cluster would give up x1 first, which is not ready"
        assert cluster.scaled == [("prefill", 3)]
        assert cluster.lease["metadata"]["annotations"]["slackwater.io/change"] == ""


async def test_a_gateway_that_ends_in_the_middle_asks_for_the_missing_server(
    tmp_path: Path,
) -> None:
    cluster = ScriptedCluster(ignores=True)
    async with clustered(cluster, tmp_path) as site:
        site.gateway.driver.post(SwitchWanted("d1", Role.PREFILL, "asked for"))
        await site.until("one is given up", lambda: cluster.scaled)
    assert cluster.scaled == [("decode", 1), ("prefill", 3)]


async def test_numbers_that_somebody_else_changes_are_theirs(tmp_path: Path) -> None:
    """The old role has its server back; the new one's number stays what they made it."""
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path) as site:
        site.gateway.driver.post(SwitchWanted("d1", Role.PREFILL, "asked for"))
        patched = cluster._patched

        def meddled(*args: Any) -> Any:
            answer = patched(*args)
            if cluster.scaled == [("decode", 1)]:
                cluster.replicas[Role.PREFILL] = 5
            return answer

        cluster._patched = meddled  # type: ignore[method-assign,assignment]  # between the two calls
        await site.until(
            "it is over", lambda: site.gateway.control.switches.outcomes, within_s=90.0
        )
        assert [it.value for it in site.gateway.control.switches.outcomes] == [
            "switched_by_another"
        ]
        assert cluster.scaled == [("decode", 1), ("decode", 2)]
        assert cluster.replicas == {Role.PREFILL: 5, Role.DECODE: 2}


async def test_an_api_that_is_away_takes_nobody_off_the_list(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path) as site:
        cluster.dead = True
        await asyncio.sleep(60.0)
        assert usable(site) == names(FOUR)
        ((outcome, why),) = await switched(site, "d1", Role.PREFILL)
        assert (outcome, "503 etcd is away" in why) == ("failed", True)
        assert usable(site) == names(FOUR)


async def test_servers_are_started_and_given_back(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    async with clustered(cluster, tmp_path) as site:
        size = site.gateway._actuator.turn.size
        assert size is not None
        assert size.launch(Role.DECODE)
        assert size.starting == {Role.DECODE: 1}
        await site.until("it serves", lambda: "x1" in usable(site), within_s=60.0)
        await site.until("it has started", lambda: size.starting == {Role.DECODE: 0})
        assert await switched(site, "d1", None) == [("done", "")]
        assert cluster.scaled == [("decode", 3), ("decode", 2)]
        assert sorted(roles(site)) == ["d2", "p1", "p2", "x1"]


class Wanted:
    """Whatever comes in, so many."""

    def __init__(self, prefills: int, decodes: int) -> None:
        self.plan = Plan(prefills=prefills, decodes=decodes, why=Why.SHORT_OF_DECODE)

    def next(
        self, memory: Memory, demand: Demand, fleet: Fleet, now_us: int
    ) -> tuple[Memory, Plan]:
        return memory, self.plan


@pytest.mark.parametrize(("budget_gpus", "scaled"), [(8, [("decode", 3), ("decode", 2)]), (0, [])])
async def test_the_fleet_grows_and_shrinks_with_what_is_wanted_within_its_budget(
    budget_gpus: int, scaled: list[tuple[str, int]], tmp_path: Path
) -> None:
    cluster = ScriptedCluster()
    control = {"policy": "dopd+", "mode": Mode.ACT, "interval_s": 2.0, "budget_gpus": budget_gpus}
    cost = Cost(model="Llama-3.1-8B", device="h100")
    async with clustered(cluster, tmp_path, control=control, cost=cost) as site:
        planner = site.gateway.control._planner
        assert planner is not None
        for decodes in (3, 2):
            planner.adopt(replace(planner.control, policy=Wanted(2, decodes)))
            await asyncio.sleep(60.0)
        assert cluster.scaled == scaled
        assert sorted(roles(site).values()) == ["decode", "decode", "prefill", "prefill"]


async def test_no_server_is_emptied_while_another_gateway_has_the_lease(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    control = {"policy": "dopd+", "mode": Mode.ACT, "interval_s": 2.0}
    cost = Cost(model="Llama-3.1-8B", device="h100")
    cluster.hold(held_by("another gateway"))
    async with clustered(cluster, tmp_path, control=control, cost=cost) as site:
        planner = site.gateway.control._planner
        assert planner is not None
        with capture_logs() as told:
            planner.adopt(replace(planner.control, policy=Wanted(3, 1)))
            for _ in range(200):
                await asyncio.sleep(0.1)
                assert usable(site) == names(FOUR)
            (hindered,) = [it for it in told if it["event"] == "somebody else changes the servers"]
            assert hindered["error"] == "another gateway has the lease"
            assert "slackwater_ratio_actuator_up 1.0" in (await site.get("/metrics")).raw.decode()
            await site.until("it falls silent", lambda: cluster.scaled, within_s=60.0)
        assert cluster.scaled[0] == ("decode", 1)


async def test_an_adviser_follows_the_pods_and_takes_no_lease(tmp_path: Path) -> None:
    cluster = ScriptedCluster()
    control = {"policy": "dopd+", "mode": Mode.ADVISE, "interval_s": 2.0, "budget_gpus": 8}
    cost = Cost(model="Llama-3.1-8B", device="h100")
    async with clustered(cluster, tmp_path, control=control, cost=cost) as site:
        planner = site.gateway.control._planner
        assert planner is not None
        planner.adopt(replace(planner.control, policy=Wanted(1, 3)))
        await asyncio.sleep(30.0)
        metrics = (await site.get("/metrics")).raw.decode()
        assert 'slackwater_ratio_servers{role="decode",which="wanted"} 3.0' in metrics
        assert (cluster.scaled, cluster.lease) == ([], {})


async def test_the_policies_reckon_with_what_a_switch_has_taken(tmp_path: Path) -> None:
    cluster = ScriptedCluster(start_s=12.0)
    control = {"policy": "dopd+", "mode": Mode.ADVISE}
    cost = Cost(model="Llama-3.1-8B", device="h100")
    async with clustered(cluster, tmp_path, control=control, cost=cost) as site:
        planner = site.gateway.control._planner
        assert planner is not None
        assert planner.control.switch_s == 45.0
        await switched(site, "d1", Role.PREFILL)
        assert 12.0 <= planner.control.switch_s < 25.0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"prefill": ""}, "are missing"),
        ({"kubeconfig": "/nowhere"}, "kubeconfig: there is no file /nowhere"),
    ],
)
async def test_a_gateway_that_cannot_reach_its_cluster_does_not_start(
    more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with clustered(ScriptedCluster(), tmp_path, **more):
            pass
    assert caught.group_contains(ConfigError, match=told)
