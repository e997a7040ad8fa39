"""A fleet starts a server in another role: real processes with a scripted server in them."""

from __future__ import annotations

import asyncio
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from backends.fleet.control import FleetSocket, controlled
from backends.fleet.fleet import Fleet
from backends.fleet.link import Link
from backends.fleet.plan import planned, turned
from backends.fleet.spec import FleetError, FleetSpec, Group
from policies.types import Role
from tests.backends.fleet.test_fleet import PROGRAM, model, pid_of

pytestmark = pytest.mark.real_time

SERVERS = (Group(role=Role.PREFILL), Group(role=Role.DECODE, count=2))


@pytest.fixture
def spec(tmp_path: Path) -> FleetSpec:
    return FleetSpec(
        model=model(tmp_path),
        python=sys.executable,
        logs=str(tmp_path / "logs"),
        kv_tokens=65_536,
        servers=SERVERS,
    )


async def role_of(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(url + "/model_info") as answer:
        return str((await answer.json(content_type=None))["disaggregation_mode"])


@asynccontextmanager
async def kept(spec: FleetSpec) -> AsyncIterator[Fleet]:
    """With whoever restarts what ends by itself."""
    async with Fleet(spec, program=PROGRAM) as fleet:
        keeping = asyncio.create_task(fleet.keep())
        yield fleet
        keeping.cancel()


def test_a_turned_server_has_the_flags_of_its_new_role_and_its_own_ports(spec: FleetSpec) -> None:
    groups = (replace(SERVERS[0], flags=("--for-prefill",)), SERVERS[1])
    spec = replace(spec, servers=groups)
    decode = planned(spec, "model")[1]
    prefill = turned(spec, decode, Role.PREFILL)
    assert prefill.argv[-1] == "--for-prefill"
    assert prefill.argv[prefill.argv.index("--disaggregation-mode") + 1] == "prefill"
    assert (prefill.name, prefill.url, prefill.env) == (decode.name, decode.url, decode.env)
    assert turned(spec, prefill, Role.DECODE) == decode


async def test_a_server_is_another_process_in_its_new_role_at_the_same_address(
    spec: FleetSpec,
) -> None:
    async with kept(spec) as fleet, aiohttp.ClientSession() as http:
        server = fleet.servers[2]
        before = await pid_of(http, server)
        done = await fleet.relaunch(server.url, Role.PREFILL)
        assert (done.why, done.is_restarted) == ("", True)
        assert await role_of(server.url) == "prefill"
        assert await pid_of(http, server) != before
        assert fleet.server("decode-1").role is Role.PREFILL


@pytest.mark.parametrize("flag", ["--die-as-prefill", "--hang-as-prefill"])
async def test_a_server_that_does_not_start_in_its_new_role_is_back_in_its_old_one(
    spec: FleetSpec, flag: str
) -> None:
    async with kept(spec) as fleet:
        server = fleet.servers[2]
        fleet.spec = replace(spec, flags=(flag,), start_timeout_s=2.0)
        done = await fleet.relaunch(server.url, Role.PREFILL)
        assert await role_of(server.url) == "decode"
        assert "weights do not fit" in done.why or "not ready after 2 s" in done.why
        assert done.is_restarted


async def test_a_fleet_keeps_the_last_of_a_role_and_refuses_what_it_cannot_do(
    spec: FleetSpec,
) -> None:
    async with kept(spec) as fleet:
        prefill, decode, _ = fleet.servers
        whys = [
            (await fleet.relaunch(url, role)).why
            for url, role in (
                (prefill.url, Role.DECODE),
                (decode.url, Role.DECODE),
                (decode.url, Role.UNIFIED),
                ("http://127.0.0.1:1", Role.PREFILL),
            )
        ]
        assert whys == [
            "it is the last prefill server",
            "it is a decode server already",
            "a unified server has neither role",
            "the fleet has no server at http://127.0.0.1:1",
        ]
        assert await role_of(prefill.url) == "prefill"


async def test_of_two_who_ask_at_once_one_is_told_that_another_does_it(spec: FleetSpec) -> None:
    async with kept(spec) as fleet:
        first, second = fleet.servers[1:]
        done = await asyncio.gather(
            fleet.relaunch(first.url, Role.PREFILL),
            fleet.relaunch(first.url, Role.PREFILL),
            fleet.relaunch(second.url, Role.PREFILL),
        )
        assert [one.by_another for one in done] == [False, True, False]
        assert [one.why for one in done[::2]] == ["", "it is the last decode server"]
        assert await role_of(second.url) == "decode"


@pytest.mark.usefixtures("_restarts_soon")
async def test_a_server_that_ends_by_itself_after_its_relaunch_is_restarted_in_its_new_role(
    spec: FleetSpec,
) -> None:
    async with kept(spec) as fleet, aiohttp.ClientSession() as http:
        server = fleet.servers[2]
        await fleet.relaunch(server.url, Role.PREFILL)
        before = await pid_of(http, server)
        await fleet.kill(server.name)
        async with asyncio.timeout(10):
            while not await fleet._is_ready(server):  # noqa: ASYNC110 - it does not call back
                await asyncio.sleep(0.05)
        assert await pid_of(http, server) != before
        assert await role_of(server.url) == "prefill"


async def test_another_process_asks_through_the_socket(spec: FleetSpec, tmp_path: Path) -> None:
    path = tmp_path / "fleet.sock"
    async with kept(spec) as fleet, controlled(fleet, path):
        ask = FleetSocket(path)
        server = fleet.servers[2]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await ask.roles())[server.url] == "decode"
        assert (await ask.relaunch(server.url, Role.PREFILL)).why == ""
        assert (await ask.roles())[server.url] == "prefill"
        assert "last decode" in (await ask.relaunch(fleet.servers[1].url, Role.PREFILL)).why
        with pytest.raises(FleetError, match="another fleet listens"):
            async with controlled(fleet, path):
                pass
    assert not path.exists()


async def test_a_fleet_that_is_gone_is_an_answer_too(tmp_path: Path) -> None:
    path = tmp_path / "fleet.sock"
    done = await FleetSocket(path).relaunch("http://127.0.0.1:1", Role.PREFILL)
    assert "no fleet listens" in done.why
    listener = await asyncio.start_unix_server(lambda _, writer: writer.close(), path)
    async with listener:
        done = await FleetSocket(path).relaunch("http://127.0.0.1:1", Role.PREFILL)
    assert "ended before it answered" in done.why


async def test_a_fleet_that_hangs_is_no_fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def says_nothing(_reader: object, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    monkeypatch.setattr("backends.fleet.control.LIST_S", 0.1)
    over, path = asyncio.Event(), tmp_path / "socket"
    async with await asyncio.start_unix_server(says_nothing, path):
        with pytest.raises(FleetError, match="has not answered"):
            await FleetSocket(path).roles()
        over.set()


async def test_an_owner_that_hangs_holds_nobody_up_while_it_is_ended() -> None:
    hangs = "import os, time; os.close(1); time.sleep(60)"
    link = Link([sys.executable, "-c", hangs], lambda _event: None)
    await link.open()
    await link.lost
    closing = asyncio.create_task(link.close())
    turns = 0
    while not closing.done():
        await asyncio.sleep(0.05)
        turns += 1
    assert turns > 5
    await closing
