"""Rows whose model goes away, that kill servers, or whose answers cannot be kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from structlog.testing import capture_logs

from backends.emulator import FaultKind
from gateway.batch import strikes
from gateway.batch.attempts import Answered
from gateway.batch.objects import Result, Row
from gateway.config import Retry
from policies.types import Kind, Role
from tests.gateway.batch.test_runner import CHAT, Office, bodies, office
from tests.gateway.gateway_under_test import UNIFIED, chat, entry_of, spec, spy_on

TWO_MODELS = (*UNIFIED, spec("u2", Role.UNIFIED, model="another"))


def others(count: int) -> list[bytes]:
    return [json.dumps(chat(8, model="another", user=str(i))).encode() for i in range(count)]


async def take_off(it: Office) -> None:
    assert (await it.site.ask("/workers/u2", b"", method="DELETE")).status < 300
    await it.site.until("it is gone", lambda: "u2" not in it.site.core.ledgers)


async def put_on(it: Office) -> None:
    entry = entry_of(it.site.fleet["u2"])
    page = {"url": entry.url, "name": "u2", "worker_type": "unified"}
    assert (await it.site.ask("/workers", page)).status == 202
    spy_on(it.site.gateway, it.site)


async def test_a_model_that_is_away_for_minutes_costs_no_row() -> None:
    async with office(TWO_MODELS) as it:
        await take_off(it)
        it.ledger.add(CHAT, others(500), within_s=86_400.0)
        await asyncio.sleep(240.0)
        assert it.ledger.results() == []
        assert sum(it.runner.tally.later.values()) < 300, "one try of some tells of all"
        await put_on(it)
        await it.done(600.0)
        assert it.statuses() == [200] * 500
        assert {entry.row.attempts for entry in it.ledger.entries.values()} == {0}


async def test_a_model_that_stays_away_is_each_rows_answer_in_the_end() -> None:
    async with office(TWO_MODELS) as it:
        it.ledger.add(CHAT, [one.replace(b"another", b"gpt-17") for one in others(300)])
        with capture_logs() as told:
            await it.done(1000.0)
        waits = [line for line in told if line["event"] == "a batch waits for its model"]
        assert ["gpt-17" in line["reason"] for line in waits] == [True], "said once"
        assert it.statuses() == [404] * 300
        error = json.loads(it.ledger.results()[0].line)["response"]["body"]["error"]
        assert (error["code"], error["param"]) == ("unknown_model", "model")


async def test_other_batches_run_while_a_model_is_away() -> None:
    async with office(TWO_MODELS) as it:
        await take_off(it)
        it.ledger.add(CHAT, others(300), within_s=86_400.0)
        await asyncio.sleep(20.0)
        second = it.ledger.add(CHAT, bodies(300))
        await it.site.until("they are done", lambda: len(it.ledger.results()) == 300, within_s=60.0)
        assert {one.row.batch for one in it.ledger.results()} == {second}
        it.ledger.over.add(1)


async def test_an_answer_that_cannot_be_kept_strands_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has line breaks, and is nested deeper than can be written again."""
    deep = "[" * 300 + "\n" + "]" * 300
    async with office(UNIFIED) as it:
        answer = it.runner._attempts.answer

        async def nested(path: str, errand: Any, watch: Any) -> Any:
            outcome = await answer(path, errand, watch)
            if json.loads(errand.body)["user"] != "3":
                return outcome
            return Answered(status=200, body=deep.encode())

        monkeypatch.setattr(it.runner._attempts, "answer", nested)
        it.ledger.add(CHAT, bodies(40), within_s=86_400.0)
        with capture_logs() as told:
            await it.done(2000.0)
        events = [line["event"] for line in told if line["log_level"] == "error"]
        assert events == ["an answer cannot be kept"] * 8
        assert sorted(it.statuses()) == [200] * 39 + [500]
        assert len(it.runner._strikes) == 0


async def test_an_endpoint_of_newer_gateways_is_left_to_them() -> None:
    async with office(UNIFIED) as it:
        it.ledger.add("/v2/new", bodies(3), within_s=86_400.0)
        await asyncio.sleep(600.0)
        assert set(it.ledger.states()) == {"QUEUED"}
        it.ledger.add(CHAT, bodies(3))
        await it.site.until("others are answered", lambda: len(it.ledger.results()) == 3)
        it.ledger.over.add(1)


async def test_a_row_that_servers_break_off_under_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strikes, "DEATHS", 6)
    async with office(UNIFIED, retry=Retry(offline_attempts=1)) as it:
        it.site.hurt("u1", FaultKind.REFUSE)
        it.ledger.add(CHAT, bodies(1), within_s=86_400.0)
        began_s = it.site.now_s()
        await it.done(20_000.0)
        assert it.statuses() == [502]
        assert it.site.now_s() - began_s > 31.0


async def test_a_row_that_ends_while_its_batch_is_looked_up_is_not_wasted() -> None:
    async with office(UNIFIED) as it:
        whole = it.rows.overdue

        async def slow(rows: Iterable[Row]) -> list[Row]:
            found = await whole(rows)
            if found:
                await asyncio.sleep(2.0)
            return found

        async def full(results: list[Result]) -> list[Result]:
            await asyncio.sleep(3.0)
            return list(results)

        it.rows.overdue, it.rows.finish = slow, full  # type: ignore[method-assign, assignment]
        it.ledger.add(CHAT, bodies(4, 150))
        await it.site.until("they run", lambda: it.site.core.placed(Kind.OFFLINE) == 4)
        it.ledger.over.add(1)
        await it.site.until("all have ended", lambda: it.runner.tally.completed == 4)
        await asyncio.sleep(3.0)
        assert it.ledger.wasted_tokens == 0
        assert it.ledger.releases == []


async def test_nothing_is_remembered_of_rows_that_others_have_ended() -> None:
    async with office(UNIFIED, retry=Retry(offline_attempts=1)) as it:
        it.site.hurt("u1", FaultKind.ERROR_STATUS, status=500, message="division by zero")
        it.ledger.add(CHAT, bodies(5), within_s=86_400.0)
        await it.site.until("they have failed", lambda: len(it.runner._strikes) == 5)
        for entry in it.ledger.entries.values():
            entry.state = type(entry.state).DONE
        await asyncio.sleep(6.0)
        assert len(it.runner._strikes) == 0
