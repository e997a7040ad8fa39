"""A gateway over a real Ray cluster of several nodes, with an emulated server in each actor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from structlog.testing import capture_logs

from backends.actuators.settings import Ray
from gateway.actuation import Actuation
from gateway.actuator_check import actuator_findings
from gateway.app import Gateway
from gateway.clock import LiveClock
from gateway.config import Config, ConfigError, RatioSettings, Server, Telemetry
from policies.events import SwitchWanted
from policies.types import Pool, Role

pytestmark = [pytest.mark.real_time, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("emulated_server.py")
NODES = 4
START_S = 20.0
"""An emulated server takes one or two; a machine that others use takes many more."""
PATIENCE_S = 3 * START_S
"""For whatever a test waits for: a start that fails, and the one that brings the server back."""


def command(moods: Path) -> str:
    python = ("env", f"PYTHONPATH={ROOT}", sys.executable)
    return shlex.join([*python, str(SCRIPT), "--moods", str(moods)])


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    """What servers do in each role, when they are not well."""
    path = tmp_path / "moods.json"
    path.write_text("{}")
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Each node has an address, a core and a GPU of its own; the head has none of the latter."""
    quick = {"initial_delay_ms": 1000, "period_ms": 500, "failure_threshold": 4}
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "node_ip_address": "127.0.0.2",
        "_system_config": {f"health_check_{key}": value for key, value in quick.items()},
    }
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
    for number in range(NODES):
        cluster.add_node(num_cpus=1, num_gpus=1, node_ip_address=f"127.0.0.{number + 3}")
    yield cluster
    cluster.shutdown()


class Fleet:
    """The gateway and what it has told."""

    def __init__(self, gateway: Gateway, told: list[Any]) -> None:
        self.gateway = gateway
        self.told = told

    def roles(self) -> list[str]:
        ledgers = self.gateway.core.ledgers.values()
        return sorted(it.worker.role.value for it in ledgers if it.usable(self._now_us()))

    def _now_us(self) -> int:
        return self.gateway.backend.now_us()

    def first(self, role: Role) -> str:
        ledgers = self.gateway.core.ledgers
        return min(name for name in ledgers if ledgers[name].worker.role is role)

    def host_of(self, name: str) -> str:
        return self.gateway.core.ledgers[name].worker.bootstrap_host

    async def until_they_are(self, *roles: str) -> None:
        await until(lambda: self.roles() == sorted(roles))

    async def switched(self, name: str, role: Role | None) -> tuple[str, str]:
        began = len(self.told)
        self.gateway.driver.post(SwitchWanted(name, role, "asked for"))
        await until(lambda: any(map(is_over, self.told[began:])))
        line = next(filter(is_over, self.told[began:]))
        return line["outcome"], line["why"]

    async def has_the_lease(self) -> None:
        turn = self.gateway._actuator.turn
        async with asyncio.timeout(PATIENCE_S):
            while await turn.hindrance() is not None:  # noqa: ASYNC110 - nor does the lease
                await asyncio.sleep(0.05)


def is_over(line: Any) -> bool:
    return bool(line["event"] == "role switch" and line["outcome"] != "hangs")


async def until(holds: Callable[[], bool]) -> None:
    """What it waits for stays so until something else is asked for."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - the cluster does not call back
            await asyncio.sleep(0.05)


@asynccontextmanager
async def standing(cluster: Any, space: str, moods: Path, **more: Any) -> AsyncIterator[Fleet]:
    told: dict[str, Any] = {
        "command": command(moods),
        "address": cluster.address,
        "namespace": space,
        "prefill": 1,
        "decode": 2,
        "pool": Pool.RELAXED,
        "start_s": START_S,
        "poll_s": 0.3,
    }
    ratio = RatioSettings(actuator=Actuation.RAY, switch_s=PATIENCE_S, ray=Ray(**told | more))
    config = Config(server=Server(port=0), telemetry=Telemetry(poll_ms=200.0), ratio=ratio)
    clock = LiveClock(asyncio.get_running_loop())
    with capture_logs() as lines:
        async with asyncio.TaskGroup() as tasks:
            gateway = Gateway(config, clock, random.Random(3), tasks, lambda _: None)
            try:
                await gateway.start()
                yield Fleet(gateway, lines)
            finally:
                await gateway.close()
    assert [it for it in lines if it["log_level"] == "error"] == []


def processes() -> Iterator[tuple[int, list[str]]]:
    """Of the servers: their command lines, by process id."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_text().split("\0")
            if line[1:2] == [str(SCRIPT)]:
                yield int(path.parent.name), line


def at_port(port: str) -> list[int]:
    return [pid for pid, line in processes() if port in line]


def servers_running() -> int:
    return len(list(processes()))


async def test_a_check_tells_of_gpus_that_are_not_there(cluster: Cluster, moods: Path) -> None:
    told = Ray(command=command(moods), address=cluster.address, decode=NODES + 1)
    config = Config(ratio=RatioSettings(actuator=Actuation.RAY, ray=told))
    clock, rng = LiveClock(asyncio.get_running_loop()), random.Random(3)
    (finding,) = await actuator_findings(config, clock, rng)
    assert finding.text == f"the Ray cluster has {NODES} GPUs, {NODES + 1} are needed"
    enough = replace(config, ratio=replace(config.ratio, ray=replace(told, decode=NODES)))
    assert await actuator_findings(enough, clock, rng) == []


async def test_servers_of_a_cluster_from_their_start_to_their_end(
    cluster: Cluster, moods: Path
) -> None:
    """One gateway for all of it: each takes seconds to join."""
    async with standing(cluster, "whole", moods) as fleet:
        await fleet.until_they_are("prefill", "decode", "decode")
        assert len({fleet.host_of(name) for name in fleet.gateway.core.ledgers}) == 3
        await switches_in_place(fleet)
        await comes_back_where_it_does_not_start(fleet, moods)
        await comes_and_goes(fleet)
        await is_followed_by_another_one(fleet, cluster)
        assert servers_running() == 3
    await until(lambda: servers_running() == 0)


async def switches_in_place(fleet: Fleet) -> None:
    name = fleet.first(Role.DECODE)
    url = fleet.gateway.core.ledgers[name].worker.url
    assert await fleet.switched(name, Role.PREFILL) == ("done", "")
    await fleet.until_they_are("decode", "prefill", "prefill")
    assert fleet.gateway.core.ledgers[name].worker.url == url
    last = fleet.first(Role.DECODE)
    assert (await fleet.switched(last, Role.PREFILL))[0] == "last_of_its_role"


async def comes_back_where_it_does_not_start(fleet: Fleet, moods: Path) -> None:
    name = fleet.first(Role.PREFILL)
    for mood, told in (
        ("dies", "weights do not fit"),
        ("hangs", f"not ready after {START_S:.0f} s"),
    ):
        set_mood(moods, decode=mood)
        outcome, why = await fleet.switched(name, Role.DECODE)
        assert (outcome, told in why) == ("failed", True)
        await fleet.until_they_are("decode", "prefill", "prefill")
    set_mood(moods)


def set_mood(moods: Path, **by_role: str) -> None:
    moods.write_text(json.dumps(by_role))


async def comes_and_goes(fleet: Fleet) -> None:
    size = fleet.gateway._actuator.turn.size
    assert size is not None
    assert size.launch(Role.DECODE)
    assert size.starting == {Role.DECODE: 1}
    await fleet.until_they_are("prefill", "prefill", "decode", "decode")
    assert await fleet.switched(fleet.first(Role.PREFILL), None) == ("done", "")
    await fleet.until_they_are("prefill", "decode", "decode")


async def is_followed_by_another_one(fleet: Fleet, cluster: Cluster) -> None:
    name = fleet.first(Role.DECODE)
    port = fleet.gateway.core.ledgers[name].worker.url.rpartition(":")[2]
    (killed,) = at_port(port)
    os.kill(killed, signal.SIGKILL)
    await until(lambda: at_port(port) not in ([], [killed]))
    await fleet.until_they_are("prefill", "decode", "decode")
    host = fleet.host_of(name)
    node = next(it for it in cluster.worker_nodes if it.node_ip_address == host)
    cluster.remove_node(node, allow_graceful=False)
    await until(lambda: host not in {fleet.host_of(it) for it in fleet.gateway.core.ledgers})
    await fleet.until_they_are("prefill", "decode", "decode")


async def test_one_gateway_at_a_time_changes_servers_and_the_next_one_goes_on(
    cluster: Cluster, moods: Path
) -> None:
    two: dict[str, Any] = {"prefill": 0, "decode": 2}
    async with standing(cluster, "two", moods, **two, outlive=True) as fleet:
        await fleet.until_they_are("decode", "decode")
        async with standing(cluster, "two", moods, **two) as other:
            await other.until_they_are("decode", "decode")
            outcome, why = await other.switched(other.first(Role.DECODE), Role.PREFILL)
            assert (outcome, why.endswith("has the lease")) == ("switched_by_another", True)
            await fleet.gateway._actuator.turn.close()
            assert servers_running() == 2
            await other.has_the_lease()
            assert await other.switched(other.first(Role.DECODE), Role.PREFILL) == ("done", "")
            await other.until_they_are("decode", "prefill")
    await until(lambda: servers_running() == 0)


async def test_without_a_cluster_the_gateway_says_so_and_does_not_start(moods: Path) -> None:
    nowhere = SimpleNamespace(address="127.0.0.9:1")
    with pytest.raises(ExceptionGroup) as caught:
        async with standing(nowhere, "none", moods, join_s=3.0):
            pass
    assert caught.group_contains(ConfigError, match="no Ray cluster at 127.0.0.9:1")
