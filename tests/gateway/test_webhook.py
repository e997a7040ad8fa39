"""Role switches by an operator's own service: a scripted receiver, emulated servers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from backends.actuators.settings import Webhook
from backends.emulator import EmulatedFleet
from gateway.actuation import Actuation
from policies.events import SwitchWanted
from policies.types import Role
from tests.gateway.actuated import FOUR, by, names, roles, started_as, switched, usable
from tests.gateway.gateway_under_test import OFFLINE, Site, spec, standing
from tests.gateway.test_live_switching import answers, whole

Reply = tuple[int, dict[str, Any]]
SECRET = "known to both"
SPARE = (*FOUR, spec("x1", Role.PREFILL))


@dataclass
class Receiver:
    """Does each change once, however often it is asked for; then it says what it is scripted to."""

    fleet: EmulatedFleet | None = None
    script: list[Reply] = field(default_factory=list)
    """Answered first, in turn; the last one for ever if `stays`."""
    stays: bool = False
    does: bool = True
    refuses: str = ""
    """Why, to every question but a check."""
    replaced_by: str = ""
    keeps_name: bool = False
    questions: list[dict[str, Any]] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    unsigned: int = 0
    _changes: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        wanted = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        self.unsigned += request.headers.get("x-slackwater-signature") != wanted
        question = json.loads(body)
        self.questions.append(question)
        self.heads.append(dict(request.headers))
        changes = question["action"] != "check"
        if changes and self.refuses:
            return web.json_response({"status": "refused", "why": self.refuses})
        if changes and self.does and question["id"] not in self._changes:
            self._changes[question["id"]] = asyncio.create_task(self._do(question))
        status, told = self._reply(question)
        return web.json_response(told, status=status)

    def _reply(self, question: dict[str, Any]) -> Reply:
        if self.script:
            return self.script[0] if self.stays else self.script.pop(0)
        change = self._changes.get(question["id"])
        if change is not None and change.done():
            change.result()
        elif change is not None:
            return 202, {"status": "pending"}
        if self.replaced_by and self.fleet is not None:
            server = self.fleet[self.replaced_by]
            name = question["worker"]["name"] if self.keeps_name else server.name
            worker = {"name": name, "url": server.url}
            worker["bootstrap_port"] = server.bootstrap_port
            return 200, {"status": "done", "worker": worker}
        return 200, {"status": "done"}

    async def _do(self, question: dict[str, Any]) -> None:
        assert self.fleet is not None
        name = question["worker"]["name"]
        if self.replaced_by:
            await self.fleet.kill(name)
        else:
            await started_as(self.fleet, name, Role(question["role"]), 5.0)


@asynccontextmanager
async def received(receiver: Receiver, **more: Any) -> AsyncIterator[Site]:
    app = web.Application()
    app.router.add_post("/hooks/servers", receiver.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks/servers"
    hook = Webhook(url=url, secret=SECRET, answer_s=1.0, poll_s=1.0, within_s=20.0)
    try:
        ratio = by(Actuation.WEBHOOK, webhook=hook)
        async with standing(SPARE, workers=sorted(names(FOUR)), ratio=ratio, **more) as site:
            receiver.fleet = site.fleet
            yield site
    finally:
        await runner.cleanup()


async def test_a_change_is_asked_for_once_and_waited_for_while_requests_come() -> None:
    receiver = Receiver()
    async with received(receiver) as site:
        async with site.meanwhile(answers(site, 30, 40, 0.5, **OFFLINE)) as asking:
            await asyncio.sleep(1.0)
            assert await switched(site, "d2", Role.PREFILL) == [("done", "")]
            told = await asking
        assert all(whole(it, 40) for it in told)
        assert roles(site)["d2"] == "prefill"
        assert len({it["id"] for it in receiver.questions}) == 1
        assert len(receiver.questions) >= 5


async def test_the_question_is_typed_signed_and_has_its_key_in_the_header() -> None:
    receiver = Receiver()
    async with received(receiver) as site:
        await switched(site, "d2", Role.PREFILL)
        question = receiver.questions[0]
        url = site.fleet["d2"].url
        assert question == {
            "schema": "slackwater.change/1",
            "id": question["id"],
            "action": "switch",
            "worker": {"name": "d2", "url": url, "model": "emulated", "role": "decode"},
            "role": "prefill",
            "within_s": 20.0,
        }
        assert receiver.heads[0]["idempotency-key"] == question["id"]
        assert receiver.unsigned == 0


@pytest.mark.parametrize(
    ("reply", "outcome", "why"),
    [
        ((200, {"status": "refused", "why": "no budget"}), "failed", "no budget"),
        ((403, {"why": "who are you?"}), "failed", "who are you?"),
        ((404, {}), "failed", "the webhook answered 404"),
        ((200, {}), "failed", "the webhook answered 200"),
        (
            (200, {"status": "done"}),
            "failed",
            "it is said to be done, and it is a decode server all the same",
        ),
        ((409, {"why": "a rollout runs"}), "switched_by_another", "a rollout runs"),
        (
            (200, {"status": "done", "worker": {"url": "there"}}),
            "failed",
            "the webhook's answer: worker.url must be http://HOST:PORT, got 'there'",
        ),
        (
            (200, {"status": "done", "worker": {"bootstrap_port": 0}}),
            "failed",
            "the webhook's answer: worker.bootstrap_port must be a port, got 0",
        ),
    ],
)
async def test_a_change_that_did_not_happen_leaves_the_server_what_it_is(
    reply: Reply, outcome: str, why: str
) -> None:
    async with received(Receiver(script=[reply], does=False)) as site:
        assert await switched(site, "d2", Role.PREFILL) == [(outcome, why)]
        assert roles(site)["d2"] == "decode"
        assert usable(site) == names(FOUR)
        assert (await site.serves()).status == 200


async def test_a_service_that_fails_for_a_while_is_asked_the_same_again() -> None:
    receiver = Receiver(script=[(500, {}), (503, {}), (429, {})])
    async with received(receiver) as site:
        assert await switched(site, "d2", Role.PREFILL) == [("done", "")]
        assert len({it["id"] for it in receiver.questions}) == 1


async def test_a_change_that_never_ends_is_cancelled_and_the_server_serves_on() -> None:
    receiver = Receiver(script=[(202, {"status": "pending"})], stays=True, does=False)
    async with received(receiver) as site:
        (over,) = await switched(site, "d2", Role.PREFILL)
        assert over == ("failed", "not over after 20 s, last: pending")
        assert [it["action"] for it in receiver.questions[-2:]] == ["switch", "cancel"]
        assert len({it["id"] for it in receiver.questions}) == 1
        assert usable(site) == names(FOUR)


async def test_a_service_that_is_not_there_is_not_waited_for_to_the_end() -> None:
    """Nobody has heard the question, so that nothing can come of it."""
    hook = Webhook(url="http://127.0.0.1:9/none", answer_s=1.0, poll_s=1.0, within_s=60.0)
    async with standing(FOUR, ratio=by(Actuation.WEBHOOK, webhook=hook)) as site:
        began_s = site.now_s()
        (over,) = await switched(site, "d2", Role.PREFILL)
        assert over[0] == "failed"
        assert over[1].startswith("nobody was there to ask: connect_failed")
        assert site.now_s() - began_s < 5.0
        assert usable(site) == names(FOUR)


async def test_who_falls_silent_in_a_change_is_told_of_once_and_asked_on() -> None:
    silent = [(202, {"status": "pending"}), (503, {}), (503, {}), (202, {"status": "pending"})]
    receiver = Receiver(script=silent, stays=False)
    async with received(receiver) as site:
        with capture_logs() as told:
            site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
            await site.until("switched", lambda: roles(site)["d2"] == "prefill", within_s=60.0)
    lost = [it for it in told if it["event"] == "the webhook does not answer"]
    assert [(it["worker"], it["error"]) for it in lost] == [("d2", "the webhook answered 503")]


async def test_another_server_may_come_in_its_place() -> None:
    async with received(Receiver(replaced_by="x1")) as site:
        assert await switched(site, "d2", Role.PREFILL) == [("done", "")]
        await site.until("x1 serves", lambda: "x1" in usable(site))
        assert roles(site) == {"p1": "prefill", "p2": "prefill", "d1": "decode", "x1": "prefill"}
        told = await answers(site, 12, 30, 0.01)
        assert all(whole(it, 30) for it in told)


async def test_another_server_may_come_under_the_same_name() -> None:
    async with received(Receiver(replaced_by="x1", keeps_name=True)) as site:
        await switched(site, "d2", Role.PREFILL)
        await site.until("it serves", lambda: "d2" in usable(site))
        assert roles(site) == {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "prefill"}
        told = await answers(site, 12, 30, 0.01)
        assert all(whole(it, 30) for it in told)
