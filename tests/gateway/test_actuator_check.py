"""What `slackwater check` says of the actuator before it has anything to do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from backends.actuators.settings import Kubernetes, Relaunch, Webhook
from gateway.actuation import Actuation
from gateway.actuator_check import actuator_findings
from gateway.config import Config, RatioSettings, WorkerEntry
from gateway.settings import ConfigError
from gateway.suitability import Level
from policies.types import Role
from tests.gateway.scripted_cluster import NAMES, NAMESPACE, ScriptedCluster, serving
from tests.gateway.test_webhook import SECRET, Receiver

DECODE = WorkerEntry(url="http://127.0.0.1:1", name="d1", role=Role.DECODE)


def config_of(ratio: RatioSettings) -> Config:
    return Config(ratio=replace(ratio, policy="dopd+"), worker=(DECODE,))


async def told(ratio: RatioSettings) -> list[str]:
    clock = asyncio.get_running_loop()
    found = await actuator_findings(config_of(ratio), clock, random.Random(3))
    assert {one.subject for one in found} <= {"ratio.actuator"}
    assert Level.BAD not in {one.level for one in found}
    return [one.text for one in found]


@asynccontextmanager
async def hooked(receiver: Receiver) -> AsyncIterator[RatioSettings]:
    app = web.Application()
    app.router.add_post("/hook", receiver.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hook = Webhook(url=f"http://127.0.0.1:{runner.addresses[0][1]}/hook", secret=SECRET)
    try:
        yield RatioSettings(actuator=Actuation.WEBHOOK, webhook=hook)
    finally:
        await runner.cleanup()


async def test_a_webhook_is_asked_whether_it_is_there_and_for_nothing_else() -> None:
    receiver = Receiver(does=False)
    async with hooked(receiver) as ratio:
        assert await told(ratio) == []
        assert [it["action"] for it in receiver.questions] == ["check"]
        assert receiver.unsigned == 0


async def test_a_webhook_that_refuses_or_is_away_is_told_of() -> None:
    async with hooked(Receiver(script=[(401, {"why": "who are you?"})], does=False)) as ratio:
        (text,) = await told(ratio)
        assert text == "the webhook does not say that it is done with a check: who are you?"
    (text,) = await told(ratio)
    assert "connect_failed" in text
    with pytest.raises(ConfigError, match=r"^ratio\.webhook\.url is missing$"):
        await told(RatioSettings(actuator=Actuation.WEBHOOK))


async def test_each_right_that_a_gateway_lacks_in_its_cluster_is_told_of(tmp_path: Path) -> None:
    cluster = ScriptedCluster(refuses={"patch deployments/scale", "create leases", "list pods"})
    cluster.replicas = {Role.PREFILL: 1, Role.DECODE: 0}
    async with serving(cluster, tmp_path) as kubeconfig:
        where = Kubernetes(
            prefill=NAMES[Role.PREFILL],
            decode=NAMES[Role.DECODE],
            namespace=NAMESPACE,
            kubeconfig=str(kubeconfig),
        )
        ratio = RatioSettings(actuator=Actuation.KUBERNETES, kubernetes=where)
        assert await told(ratio) == [
            "we may not list pods in the namespace inference",
            "we may not create leases of coordination.k8s.io in the namespace inference",
            "we may not patch deployments/scale of apps in the namespace inference",
            "the cluster is to have no decode server at all",
        ]
        (text,) = await told(replace(ratio, kubernetes=replace(where, decode="none")))
        assert "deployments/none/scale: 404 no such deployment" in text
        assert cluster.scaled == []


async def test_a_fleet_that_is_away_is_told_of(tmp_path: Path) -> None:
    control = Relaunch(control=str(tmp_path / "fleet.sock"))
    (text,) = await told(RatioSettings(actuator=Actuation.RELAUNCH, relaunch=control))
    assert text.startswith("no fleet listens on")
    with pytest.raises(ConfigError, match="needs a fleet"):
        await told(RatioSettings(actuator=Actuation.RELAUNCH))


async def test_nothing_is_asked_where_nothing_is_switched() -> None:
    config = Config(ratio=RatioSettings(actuator=Actuation.WEBHOOK), worker=(DECODE,))
    found = await actuator_findings(config, asyncio.get_running_loop(), random.Random(3))
    assert found == []
