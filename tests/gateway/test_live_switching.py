"""Role switches through HTTP: emulated servers, the real data path, virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from backends.actuators.turning import Turning
from backends.emulator import FaultKind
from gateway.actuation import Actuation
from gateway.config import Cost, RatioSettings
from gateway.planning import Mode
from policies.events import SwitchWanted
from policies.types import Role
from tests.gateway.actuated import by, switched
from tests.gateway.gateway_under_test import OFFLINE, QUICK, Site, Told, generate, spec, standing

FLEET = (
    spec("p1", Role.PREFILL),
    *(spec(f"d{i}", Role.DECODE) for i in (1, 2, 3)),
)
FIXED = (
    spec("p1", Role.PREFILL),
    *(spec(f"d{i}", Role.DECODE, role_switch=False) for i in (1, 2)),
)


async def answers(
    site: Site, count: int, tokens: int, every_s: float, **headers: Any
) -> list[Told]:
    async with asyncio.TaskGroup() as group:
        asked = []
        for number in range(count):
            body = generate(tokens, text=f"prompt number {number} " * 40, stream=True)
            asked.append(group.create_task(site.ask("/generate", body, headers or None)))
            await asyncio.sleep(every_s)
    return [task.result() for task in asked]


def roles(site: Site) -> dict[str, str]:
    return {name: ledger.worker.role.value for name, ledger in site.core.ledgers.items()}


def whole(told: Told, tokens: int) -> bool:
    return (
        told.status == 200
        and told.events[-1] == "[DONE]"
        and (told.events[-2]["meta_info"]["completion_tokens"] == tokens)
    )


async def test_a_decode_server_becomes_a_prefill_server_while_requests_come() -> None:
    async with standing(FLEET) as site:
        async with site.meanwhile(answers(site, 60, 40, 0.1)) as asking:
            await asyncio.sleep(1.0)
            site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
            told = await asking
        assert all(whole(it, 40) for it in told)
        assert roles(site)["d2"] == "prefill"
        assert site.core.ledgers["d2"].dispatched > 0


async def test_offline_work_gives_way_to_a_switch_and_is_whole_in_the_end() -> None:
    async with standing(FLEET) as site:
        async with site.meanwhile(answers(site, 8, 600, 0.01, **OFFLINE)) as asking:
            await asyncio.sleep(1.0)
            began_s = site.now_s()
            site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
            await site.until("d2 has switched", lambda: roles(site)["d2"] == "prefill")
            took_s = site.now_s() - began_s
            told = await asking
        assert all(whole(it, 600) for it in told)
        assert took_s < 2.0


async def test_a_server_that_does_not_answer_after_its_switch_is_found_by_its_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def silent(*_: object) -> None:
        return None

    monkeypatch.setattr(Turning, "role_of", silent)
    async with standing(FIXED) as site:
        site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
        ledger = site.core.ledgers["d2"]
        await site.until("it is out", lambda: not ledger.up)
        await site.until("it is back", lambda: ledger.usable(0))
        assert roles(site)["d2"] == "decode"


async def test_a_server_that_refuses_to_switch_serves_on() -> None:
    async with standing(FIXED) as site:
        site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
        await asyncio.sleep(3.0)
        assert roles(site)["d2"] == "decode"
        assert site.core.ledgers["d2"].usable(0)
        assert (await site.serves()).status == 200


async def test_a_server_that_is_dead_when_it_is_to_switch_stays_out() -> None:
    async with standing(FLEET) as site:
        await site.fleet.kill("d2")
        site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
        await asyncio.sleep(1.0)
        assert not site.core.ledgers["d2"].usable(0)
        assert (await site.serves()).status == 200


async def test_a_switch_that_hangs_ends_with_its_server_serving_as_what_it_was() -> None:
    ratio = by(Actuation.SGLANG, switch_s=20.0)
    async with standing(FLEET, ratio=ratio) as site:
        site.hurt("d2", FaultKind.HANG, path="/pd_role_switch")
        ((outcome, why),) = await switched(site, "d2", Role.PREFILL)
        assert (outcome, why.endswith("after 20.0 s")) == ("failed", True)
        assert site.now_s() < 30.0
        assert (roles(site)["d2"], site.core.ledgers["d2"].usable(0)) == ("decode", True)


def controlled(mode: Mode) -> dict[str, Any]:
    online = replace(QUICK.classes.online, ttft_ms=500.0, tpot_ms=9.0, patience=100.0)
    return {
        "classes": replace(QUICK.classes, online=online),
        "cost": Cost(model="Llama-3.1-8B", device="h100"),
        "ratio": RatioSettings(policy="dopd+", mode=mode, interval_s=5.0),
        "idle_s": 1.0,  # of the first interval
    }


BUSY_PREFILLS = (
    *(spec(f"p{i}", Role.PREFILL, kv_tokens=6_000) for i in (1, 2, 3)),
    spec("d1", Role.DECODE, kv_tokens=6_000),
)


async def test_the_controller_gives_decode_what_prefill_can_spare() -> None:
    """Short prompts and long answers on a fleet that was made for the reverse."""
    async with standing(BUSY_PREFILLS, **controlled(Mode.ACT)) as site:
        told = await answers(site, 60, 300, 0.05)
        assert all(it.status == 200 for it in told)
        assert list(roles(site).values()).count("decode") > 1
        assert "prefill" in roles(site).values()
        metrics = (await site.get("/metrics")).raw.decode()
    assert 'slackwater_role_switches_total{outcome="done"}' in metrics
    assert 'slackwater_ratio_servers{role="decode",which="wanted"}' in metrics


async def test_fifty_times_the_load_after_none_at_all_is_borne_and_forgotten() -> None:
    """Nothing for a minute, then sixty at once: a controller acts, and swings in no direction."""
    async with standing(BUSY_PREFILLS, **controlled(Mode.ACT)) as site:
        await asyncio.sleep(60.0)
        assert roles(site) == {"p1": "prefill", "p2": "prefill", "p3": "prefill", "d1": "decode"}
        told = await answers(site, 20, 20, 1.0)
        told += await answers(site, 60, 200, 0.02)
        assert all(it.status == 200 for it in told)
        after = roles(site)
        assert {"prefill", "decode"} == {*after.values()}
        await asyncio.sleep(300.0)
        assert roles(site) == after


async def test_an_adviser_changes_nothing() -> None:
    async with standing(BUSY_PREFILLS, **controlled(Mode.ADVISE)) as site:
        async with site.meanwhile(answers(site, 60, 300, 0.05)) as asking:
            await asyncio.sleep(6.5)
            metrics = (await site.get("/metrics")).raw.decode()
            await asking
        assert list(roles(site).values()).count("decode") == 1
    assert 'slackwater_ratio_servers{role="decode",which="had"} 1.0' in metrics
    assert 'slackwater_ratio_servers{role="decode",which="wanted"} 1.0' not in metrics


async def test_its_own_switch_is_not_told_as_somebody_elses() -> None:
    """Probes come while it is under way, and one that asks anew who it is comes after it."""
    probing = replace(QUICK.telemetry, poll_ms=10.0)
    async with standing(FLEET, telemetry=probing) as site:
        with capture_logs() as told:
            site.gateway.driver.post(SwitchWanted("d2", Role.PREFILL, "asked for"))
            await site.until("d2 has switched", lambda: roles(site)["d2"] == "prefill")
            (server,) = [it for it in site.gateway.backend.servers() if it.name == "d2"]
            server.is_known = False
            await site.until("it was asked", lambda: server.is_known)
            await asyncio.sleep(1.0)
        said = {it["event"] for it in told}
        assert "role switch" in said
        assert (
            said
            & {
                "worker has switched its role",
                "the server has another role than configured",
            }
            == set()
        )
