"""Servers with the plug-in do by themselves what they took on, and are counted on for no more."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from backends.http import Upstream
from backends.sglang import Server
from backends.sglang_plugin.control import Control, adjusted, setting_of
from gateway.core import Core
from gateway.engine_link import BLIND_FOR_GOOD, UNHEARD, UNTAKEN, EngineLink
from gateway.facts import Facts
from gateway.plugin_settings import PluginSettings
from gateway.roll import Roll
from gateway.rules import Rules
from gateway.step_reports import reachable
from gateway.suitability import SEES_NONE, Level, of_server
from policies.events import Event
from policies.step_line import StepLine
from policies.types import Role, Worker

ON = {"on": True, "why_off": "", "faults": 0}


def state(**features: dict[str, Any]) -> dict[str, Any]:
    """Of a server whose plug-in reports nothing, unless told otherwise."""
    told = {"decode": ON, "prefill": ON, "reports": {**ON, "on": False}}
    told |= features
    plain = {"mode": "all", "line_from": "steps", "reports": ""}
    return {"internal_states": [{"slackwater": {"features": told, **plain}}]}


class Engine:
    """Answers as a server's control pages do."""

    def __init__(self) -> None:
        self.info = state()
        self.control = Control()
        self.pushed: list[dict[str, float]] = []
        self.takes: object = [True]
        self.status = 200
        self.busy_s = 0.0

    async def set(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.busy_s)
        told = (await request.json())["server_args"]
        self.pushed.append(told)
        self.control = adjusted(self.control, setting_of(told, drill=False), 0.0)
        return web.json_response(self.takes, status=self.status)

    async def tell(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)


class Site:
    def __init__(self, engine: Engine, server: Server, link: EngineLink, core: Core) -> None:
        self.engine, self.server, self.link, self.core = engine, server, link, core

    def predicts(self, line: StepLine | None) -> None:
        """What the gateway's cost model says of its steps from now on."""
        steps = None if line is None else SimpleNamespace(step_line=line)
        ledgers = cast("dict[str, Any]", self.core.ledgers)
        ledgers["w"] = SimpleNamespace(steps=steps)

    async def met(self) -> list[str]:
        return sorted(await self.link.meet(self.server, self.engine.info))


@asynccontextmanager
async def standing(**settings: Any) -> AsyncIterator[Site]:
    engine = Engine()
    app = web.Application()
    app.router.add_post("/set_internal_state", engine.set)
    app.router.add_get("/server_info", engine.tell)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    worker = Worker(name="w", url=f"http://127.0.0.1:{runner.addresses[0][1]}", role=Role.UNIFIED)
    events: list[Event] = []
    server = Server(worker, Upstream(worker.url, connect_timeout_s=1.0))
    async with asyncio.TaskGroup() as tasks:
        clock = asyncio.get_running_loop()
        core = Core(Rules())
        link = EngineLink(events.append, core, clock, tasks, 100_000.0)
        link.settings = replace(PluginSettings(), **settings)
        server.is_known = True
        yield Site(engine, server, link, core)
        link.close()
        server.upstream.close()
    await runner.cleanup()


async def test_an_engine_takes_on_what_it_has_and_what_is_wanted() -> None:
    async with standing() as site:
        assert await site.met() == ["decode", "online-first", "prefill"]
        told = site.engine.pushed[0]
        assert (told["slackwater_mode"], told["slackwater_displace"]) == (1, 1)
        assert told["slackwater_lease_s"] == 30.0


async def test_a_feature_that_is_off_there_is_not_counted_on() -> None:
    async with standing() as site:
        site.engine.info = state(decode={"on": False, "why_off": "tensor parallel", "faults": 0})
        assert await site.met() == ["prefill"]
        assert site.engine.pushed[0]["slackwater_mode"] == 0


async def test_what_is_not_wanted_is_switched_off() -> None:
    async with standing(decode="off", displace=False) as site:
        assert await site.met() == []
        assert site.engine.pushed[0]["slackwater_mode"] == 0


async def test_a_stock_server_is_asked_for_nothing() -> None:
    async with standing() as site:
        site.engine.info = {"internal_states": [{}]}
        assert await site.met() == []
        assert site.engine.pushed == []


@pytest.mark.parametrize(("status", "takes"), [(401, {"error": "key"}), (200, [False]), (200, {})])
async def test_a_server_that_takes_no_settings_is_used_as_a_stock_one(
    status: int, takes: object
) -> None:
    async with standing() as site:
        site.engine.status, site.engine.takes = status, takes
        with capture_logs() as told:
            assert await site.met() == []
        off = next(line["off"] for line in told if line["event"] == "engine plug-in")
        assert off["decode"] == off["prefill"] == UNTAKEN


async def test_a_server_too_busy_to_take_settings_when_it_is_met_is_told_again() -> None:
    async with standing() as site:
        site.engine.busy_s = 6.0
        assert await site.met() == []
        site.engine.busy_s = 0.0
        await asyncio.sleep(11)
        assert not site.server.is_known
        assert await site.met() == ["decode", "online-first", "prefill"]


async def test_a_server_that_goes_on_to_take_no_settings_is_told_again_and_stays_known() -> None:
    async with standing() as site:
        site.engine.takes = [False]
        await site.met()
        await asyncio.sleep(65)
        assert site.server.is_known
        assert len(site.engine.pushed) == 7


async def test_the_lease_is_renewed_before_it_ends() -> None:
    async with standing() as site:
        await site.met()
        await asyncio.sleep(25)
        assert len(site.engine.pushed) == 3
        assert site.server.is_known


async def test_a_feature_that_shuts_itself_off_has_its_server_asked_anew() -> None:
    async with standing() as site:
        await site.met()
        site.engine.info = state(decode={"on": False, "why_off": "3 faults", "faults": 3})
        await asyncio.sleep(11)
        assert not site.server.is_known
        assert await site.met() == ["prefill"]


@pytest.mark.parametrize(
    "odd",
    [
        [],
        {"internal_states": {"slackwater": 1}},
        {"internal_states": [{"slackwater": {"features": ["decode"]}}]},
        {"internal_states": [{"slackwater": {"features": {"decode": 1}}}]},
    ],
)
async def test_a_server_that_says_odd_things_has_its_plug_in_lost_and_nothing_else(
    odd: Any,
) -> None:
    async with standing() as site:
        await site.met()
        site.engine.info = odd
        await asyncio.sleep(11)
        assert not site.server.is_known
        assert await site.met() == []


async def test_a_gateway_without_pyzmq_hears_no_reports_and_says_how_it_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.delitem(sys.modules, "gateway.step_reports", raising=False)
    async with standing() as site:
        site.engine.info = state(reports=ON)
        with capture_logs() as told:
            assert await site.met() == ["decode", "online-first", "prefill"]
        assert [line["off"] for line in told if line["event"] == "engine plug-in"] == [
            {"reports": UNHEARD}
        ]


async def test_reports_from_nowhere_are_not_heard_and_the_lease_is_renewed() -> None:
    async with standing() as site:
        site.engine.info = state(reports=ON)
        site.engine.info["internal_states"][0]["slackwater"]["reports"] = "nowhere"
        assert "reports" in await site.met()
        await asyncio.sleep(25)
        assert len(site.engine.pushed) == 3


@pytest.mark.parametrize(
    ("told", "url", "endpoint"),
    [
        ("tcp://0.0.0.0:7001", "http://10.0.0.3:30000", "tcp://10.0.0.3:7001"),
        ("tcp://[::]:7001", "http://[fd00::3]:30000", "tcp://[fd00::3]:7001"),
        ("tcp://*:7001", "http://node-3:30000", "tcp://node-3:7001"),
        ("tcp://10.1.0.3:7001", "http://10.0.0.3:30000", "tcp://10.1.0.3:7001"),
        ("ipc:///run/steps", "http://127.0.0.1:30000", "ipc:///run/steps"),
    ],
)
def test_an_engine_on_all_of_its_addresses_is_heard_where_it_serves(
    told: str, url: str, endpoint: str
) -> None:
    assert reachable(told, url) == endpoint


async def test_what_goes_wrong_with_one_engine_ends_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_info: object) -> None:
        raise RuntimeError

    async with standing() as site:
        await site.met()
        monkeypatch.setattr("gateway.engine_link.states_of", fails)
        await asyncio.sleep(11)
        assert not site.server.is_known


async def test_a_renewal_that_fails_once_is_made_up_for() -> None:
    async with standing() as site:
        await site.met()
        site.engine.status = 503
        await asyncio.sleep(22)
        site.engine.status = 200
        await asyncio.sleep(60)
        assert site.server.is_known


async def test_an_engine_that_is_silent_for_the_time_of_a_lease_is_asked_anew() -> None:
    async with standing() as site:
        await site.met()
        site.engine.status = 503
        await asyncio.sleep(31)
        assert not site.server.is_known
        assert site.server.is_doubted


async def test_a_server_that_is_taken_off_the_list_is_told_nothing_more() -> None:
    async with standing() as site:
        await site.met()
        site.link.forget("w")
        await asyncio.sleep(60)
        assert len(site.engine.pushed) == 1
        assert site.link.heard == {}


async def test_settings_are_numbers() -> None:
    async with standing(decode="slack", hold_steps=8, most_parked_ms=500.0) as site:
        await site.met()
        told = site.engine.pushed[0]
        assert json.loads(json.dumps(told)) == told
        assert (told["slackwater_mode"], told["slackwater_hold_steps"]) == (2, 8)
        assert told["slackwater_most_parked_us"] == 500_000


async def test_an_engine_forgets_the_line_of_a_cost_model_that_is_gone() -> None:
    line = StepLine(50.0, 1.0, 0.01)
    async with standing() as site:
        site.predicts(line)
        await site.met()
        assert site.engine.control.line == line
        site.predicts(None)
        await asyncio.sleep(11)
        assert site.engine.control.line is None


async def test_a_gateway_without_a_cost_model_takes_back_what_another_one_had_set() -> None:
    async with standing() as site:
        site.engine.control = Control(line=StepLine(50.0))
        await site.met()
        assert site.engine.control.line is None


def findings(info: dict[str, Any]) -> list[tuple[Level, str]]:
    worker = Worker(name="w", url="http://w", role=Role.UNIFIED)
    facts = Facts(worker=worker, configured=worker, info=info, models=("m",))
    return [(one.level, one.text) for one in of_server(facts) if "plug-in" in one.text]


def test_check_says_what_a_server_has_of_it_and_why_not_the_rest() -> None:
    off = {"on": False, "why_off": "3 faults", "faults": 3}
    assert findings({"version": "0.5.23"}) == []
    assert findings({"version": "0.5.23", **state(prefill=off)}) == [
        (Level.NOTE, "it has the plug-in: decode; mode all"),
        (Level.WARNING, SEES_NONE),
        (Level.WARNING, "the plug-in's prefill is off: 3 faults"),
        (Level.WARNING, "the plug-in's reports is off: it is off"),
    ]


async def test_an_engine_that_knows_no_step_times_is_not_counted_on_until_it_does() -> None:
    async with standing() as site:
        blind = site.engine.info["internal_states"][0]["slackwater"]
        blind["line_from"] = ""
        with capture_logs() as told:
            assert await site.met() == ["decode", "prefill"]
        assert site.engine.control.mode == "online-first"
        assert [(line["uses"], line["off"]["decode"]) for line in told if "uses" in line] == [
            (["prefill"], BLIND_FOR_GOOD)
        ]
        blind["line_from"] = "steps"
        await asyncio.sleep(11)
        assert not site.server.is_known
        assert await site.met() == ["decode", "online-first", "prefill"]


async def test_a_line_of_another_gateway_is_no_knowledge_of_steps_but_ones_own_is() -> None:
    async with standing() as site:
        site.engine.info["internal_states"][0]["slackwater"]["line_from"] = "gateway"
        assert "online-first" not in await site.met()
        site.predicts(StepLine(50.0))
        assert "online-first" in await site.met()


async def test_what_an_engine_learns_is_said_when_it_has_learnt_it() -> None:
    async with standing(decode="slack") as site:
        blind = site.engine.info["internal_states"][0]["slackwater"]
        blind["line_from"] = ""
        with capture_logs() as told:
            await site.met()
            await asyncio.sleep(11)
            blind["line_from"] = "steps"
            await asyncio.sleep(11)
        said = [line["uses"] for line in told if line["event"] == "engine plug-in"]
        assert said == [["prefill"], ["decode", "prefill"]]


async def test_slack_keeps_nothing_off_so_offline_work_is_kept_off_from_here() -> None:
    async with standing(decode="slack") as site:
        assert await site.met() == ["decode", "prefill"]
        assert site.engine.control.mode == "slack"


async def test_a_feature_that_a_person_has_tried_again_is_found() -> None:
    broken, unnamed = {**ON, "on": False, "faults": 3}, {**ON, "on": False}
    async with standing() as site:
        site.engine.info = state(decode=broken, prefill=unnamed)
        assert await site.met() == []
        site.engine.info = state(prefill=unnamed)
        await asyncio.sleep(11)
        assert not site.server.is_known
        assert await site.met() == ["decode", "online-first"]


async def test_the_mode_is_said_and_said_again_when_a_reload_has_changed_it() -> None:
    async with standing() as site:
        with capture_logs() as told:
            for mode in ("online-first", "online-first", "slack", "off"):
                site.link.settings = replace(PluginSettings(), decode=mode)
                await site.met()
        said = [line["mode"] for line in told if line["event"] == "engine plug-in"]
        assert said == ["online-first", "slack", "all"]


async def test_a_name_that_is_no_feature_is_told_in_the_log_and_by_check() -> None:
    async with standing() as site:
        site.engine.info["internal_states"][0]["slackwater"]["unknown"] = ["decod"]
        with capture_logs() as told:
            await site.met()
        off = next(line["off"] for line in told if line["event"] == "engine plug-in")
        assert off["decod"].startswith("no such feature")
        assert [level for level, text in findings(site.engine.info) if "decod is off" in text] == [
            Level.WARNING
        ]


class Known:
    """A list of one server; the same object stands for whoever asks it."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def servers(self) -> list[Server]:
        return [self.server]

    def forget(self, _name: str) -> None: ...

    remove = forget


async def test_a_server_that_an_actuator_takes_off_the_list_is_told_nothing_more() -> None:
    async with standing() as site:
        await site.met()
        known, tasks = cast("Any", Known(site.server)), cast("Any", None)
        Roll(known, known, lambda _event: None, tasks, site.link.forget).leave("w")
        await asyncio.sleep(60)
        assert len(site.engine.pushed) == 1
        assert site.link.heard == {}
