"""Rows are run where there is room, each answered once, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from structlog.testing import capture_logs

from backends.checkpoint import Checkpoint
from backends.emulator import FaultKind, ServerSpec
from gateway.batch.attempts import Attempts
from gateway.batch.faults import StorageFull, StorageUnavailable
from gateway.batch.held import Held
from gateway.batch.objects import Result, Row
from gateway.batch.pace import PaceRule
from gateway.batch.runner import Runner, RunnerRule
from gateway.config import Retry
from gateway.passing import Passing
from policies.types import Kind
from tests.gateway.batch.memory_rows import Ledger, MemoryRows
from tests.gateway.gateway_under_test import (
    PAIR,
    TWO_PAIRS,
    UNIFIED,
    Site,
    chat,
    generate,
    standing,
)

CHAT = "/v1/chat/completions"
UNIX_S = 1_700_000_000


@dataclass
class Office:
    site: Site
    ledger: Ledger
    rows: MemoryRows
    runner: Runner

    async def done(self, within_s: float = 300.0) -> None:
        await self.site.until("all rows are done", lambda: self.ledger.is_done, within_s)

    def statuses(self) -> list[int]:
        return [json.loads(one.line)["response"]["status_code"] for one in self.ledger.results()]


def unix_us() -> int:
    return round((UNIX_S + asyncio.get_running_loop().time()) * 1e6)


def runner_of(site: Site, rows: MemoryRows, **rule: Any) -> Runner:
    gateway, loop = site.gateway, asyncio.get_running_loop()
    passing = Passing(gateway.front, gateway.core, gateway.backend, loop, random.Random(3))
    attempts = Attempts(gateway.front, passing)
    rng = random.Random(rows.owner)
    settings = RunnerRule(**rule)
    runs = gateway.backend.runs
    return Runner(rows, rows.bodies, attempts, runs, loop, unix_us, rng, settings)


@asynccontextmanager
async def office(
    specs: Sequence[ServerSpec] = PAIR,
    *,
    rule: dict[str, Any] | None = None,
    ledger: Ledger | None = None,
    **more: Any,
) -> AsyncIterator[Office]:
    ledger = ledger or Ledger(unix_us)
    async with standing(specs, **more) as site:
        rows = MemoryRows(ledger)
        await rows.join()
        runner = runner_of(site, rows, **(rule or {}))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(runner.run())
            try:
                yield Office(site, ledger, rows, runner)
            finally:
                runner.drain(0.0)
                await running


def bodies(count: int, tokens: int = 8) -> list[bytes]:
    return [json.dumps(chat(tokens, user=str(i))).encode() for i in range(count)]


def native(count: int, tokens: int) -> list[bytes]:
    return [json.dumps(generate(tokens, text=f"Tale {i}")).encode() for i in range(count)]


async def test_all_rows_are_answered_each_in_openais_form() -> None:
    async with office() as it:
        it.ledger.add(CHAT, bodies(200))
        await it.done()
        lines = [json.loads(one.line) for one in it.ledger.results()]
        assert {line["custom_id"] for line in lines} == {f"row-{i}" for i in range(1, 201)}
        assert {line["response"]["status_code"] for line in lines} == {200}
        assert lines[0]["response"]["body"]["choices"][0]["message"]["content"]
        assert it.runner.tally.completed == 200
        assert it.runner.tally.generated_tokens == 200 * 8
        assert len(it.runner) == 0


async def test_a_rows_own_fault_is_its_answer_and_the_others_go_on() -> None:
    async with office() as it:
        it.ledger.add(CHAT, [b"{}", *bodies(3)])
        await it.done()
        assert it.statuses() == [400, 200, 200, 200]
        assert [one.failed for one in it.ledger.results()] == [True, False, False, False]


async def test_only_as_many_rows_are_taken_as_can_run_soon() -> None:
    async with office(PAIR, entries={"d1": {"max_running": 8}}) as it:
        it.ledger.add(CHAT, bodies(1000, 400))
        await it.site.until("it is full", lambda: it.site.core.placed(Kind.OFFLINE) == 8)
        await asyncio.sleep(2.0)
        assert len(it.runner) <= 8 + 2 * 16
        assert it.runner.running == 8
        # The rest would take an hour.
        it.ledger.over.add(1)


async def test_rows_that_end_at_once_leave_the_loop_to_others() -> None:
    """Nothing but their number holds them up: each is refused by the gateway itself."""
    async with office() as it:
        it.ledger.add(CHAT, [b"{}"] * 400)
        began_s = asyncio.get_running_loop().time()
        await it.done()
        assert max(it.rows.claims) <= 32
        assert 0.2 < asyncio.get_running_loop().time() - began_s < 5.0


async def test_rows_in_memory_are_bounded() -> None:
    async with office(TWO_PAIRS, rule={"pace": PaceRule(most_held=10)}) as it:
        it.ledger.add(CHAT, bodies(100))
        most = 0
        while not it.ledger.is_done:
            most = max(most, len(it.runner))
            await asyncio.sleep(0.01)
        assert 5 < most <= 10


async def test_a_dead_fleet_is_waited_for() -> None:
    async with office(UNIFIED) as it:
        await it.site.fleet["u1"].kill()
        await it.site.until("it is known", lambda: not it.site.core.ledgers["u1"].up)
        it.ledger.add(CHAT, bodies(50))
        await asyncio.sleep(120.0)
        assert not it.ledger.results()
        assert len(it.runner) <= 32
        assert sum(it.runner.tally.later.values()) < 500
        assert {row.row.attempts for row in it.ledger.entries.values()} == {0}
        await it.site.fleet["u1"].restart()
        await it.done(60.0)
        assert set(it.statuses()) == {200}


async def test_servers_that_die_in_mid_batch_cost_no_row() -> None:
    async with office(TWO_PAIRS) as it:
        it.ledger.add(CHAT, bodies(200, 40))
        await it.site.until("some are done", lambda: len(it.ledger.results()) > 20)
        await it.site.fleet["d1"].kill()
        await asyncio.sleep(5.0)
        await it.site.fleet["p2"].kill()
        await asyncio.sleep(5.0)
        await it.site.fleet["d1"].restart()
        await it.site.fleet["p2"].restart()
        await it.done()
        assert it.statuses() == [200] * 200


async def test_what_a_living_server_fails_for_ever_is_given_up() -> None:
    async with office(UNIFIED, retry=Retry(offline_attempts=1)) as it:
        it.site.hurt("u1", FaultKind.ERROR_STATUS, status=500, message="division by zero")
        it.ledger.add(CHAT, bodies(1), within_s=86_400.0)
        await it.done(20_000.0)
        assert it.statuses() == [502]
        assert b"division by zero" in it.ledger.results()[0].line
        assert it.runner.tally.failed == 1


async def test_a_cancelled_batch_leaves_its_servers_at_once() -> None:
    async with office() as it:
        it.ledger.add(CHAT, bodies(100, 2000))
        it.ledger.add(CHAT, bodies(1, 10))
        await it.site.until("they run", lambda: it.site.core.placed(Kind.OFFLINE) > 5)
        it.ledger.over.add(1)
        await it.site.until("the other batch goes", lambda: it.ledger.results(), 10.0)
        await asyncio.sleep(1.5)
        assert len(it.runner) == 0
        assert "CLAIMED" not in it.ledger.states()


async def test_a_window_that_ends_takes_its_rows_off() -> None:
    async with office(UNIFIED, entries={"u1": {"max_running": 2}}) as it:
        it.ledger.add("/generate", native(20, 2000), within_s=3.0)
        await asyncio.sleep(6.0)
        assert len(it.runner) == 0
        assert it.ledger.wasted_tokens > 0


async def test_a_store_in_trouble_loses_no_result() -> None:
    async with office() as it:
        it.ledger.add(CHAT, bodies(60, 20))
        await it.site.until("some are done", lambda: len(it.ledger.results()) > 5)
        it.rows.trouble = StorageUnavailable("locked")
        await asyncio.sleep(8.0)
        recorded = len(it.ledger.results())
        sent = len(it.site.sent)
        it.rows.trouble = None
        await it.site.until("they are told", lambda: len(it.ledger.results()) > recorded)
        await it.done()
        assert it.statuses() == [200] * 60
        assert len(it.site.sent) == 2 * 60, "no row was run twice"
        assert sent <= 2 * 60


async def test_a_store_that_can_be_read_but_not_written_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def full(results: Sequence[Result]) -> list[Result]:
        raise StorageFull("full")

    async with office() as it:
        it.ledger.add(CHAT, bodies(60, 20))
        await it.site.until("some are done", lambda: len(it.ledger.results()) > 5)
        with capture_logs() as told:
            with monkeypatch.context() as disk:
                disk.setattr(it.rows, "finish", full)
                await asyncio.sleep(20.0)
            await it.done()
        events = [line["event"] for line in told if "store of batches" in line["event"]]
        assert events == ["the store of batches is in trouble", "the store of batches works again"]


async def test_a_lost_lease_drops_the_rows_and_others_answer_them() -> None:
    async with office() as it:
        it.ledger.add("/generate", native(20, 300))
        await it.site.until("they run", lambda: it.site.core.placed(Kind.OFFLINE) > 5)
        it.ledger.until_us["one"] = 0
        await it.site.until("it is known", lambda: not len(it.runner))
        await it.rows.join()
        await it.done()
        assert it.runner.tally.leases_lost == 1
        assert it.statuses() == [200] * 20


@pytest.mark.parametrize("within_s", [0.0, 1.0])
async def test_a_shutdown_gives_rows_back_with_what_they_have(within_s: float) -> None:
    ledger = Ledger(unix_us)
    async with office(ledger=ledger) as it:
        ledger.add("/generate", native(10, 1000))
        await it.site.until("they run", lambda: it.site.core.placed(Kind.OFFLINE) == 10)
        await asyncio.sleep(2.0)
        it.runner.drain(within_s)
        await it.site.until("they are back", lambda: set(ledger.states()) == {"QUEUED"}, 3.0)
        kept = [entry.row.checkpoint_tokens for entry in ledger.entries.values()]
        assert min(kept) > 25
        assert {entry.row.attempts for entry in ledger.entries.values()} == {0}


async def test_what_was_kept_is_not_made_again() -> None:
    ledger = Ledger(unix_us)
    async with office(ledger=ledger) as it:
        ledger.add("/generate", native(4, 400))
        await it.site.until("they run", lambda: it.site.core.placed(Kind.OFFLINE) == 4)
        await asyncio.sleep(2.0)
    kept = {key: entry.row.checkpoint_tokens for key, entry in ledger.entries.items()}
    async with office(ledger=ledger) as it:
        await it.done()
        asked = [sent.body["sampling_params"]["max_new_tokens"] for sent in it.site.sent_to("d1")]
        assert sorted(asked) == sorted(400 - tokens for tokens in kept.values())
        lines = [json.loads(one.line) for one in ledger.results()]
        lengths = [len(line["response"]["body"]["output_ids"]) for line in lines]
        assert lengths == [400] * 4
        assert it.runner.tally.resumed == 4


async def test_checkpoints_are_written_while_rows_run() -> None:
    async with office(rule={"checkpoint_s": 1.0}) as it:
        it.ledger.add("/generate", native(2, 600))
        await it.done()
        told = [tokens for key, tokens in it.ledger.marks if key == (1, 1)]
        assert len(told) > 2
        assert told == sorted(set(told))


async def test_answers_are_read_for_their_checkpoints_some_tokens_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That many take two milliseconds to read, and online requests go on in between."""
    loop, read_tokens, read = asyncio.get_running_loop(), Counter[float](), Held.taken

    def taken(held: Held, fresh_tokens: int) -> Checkpoint | None:
        if found := read(held, fresh_tokens):
            read_tokens[loop.time()] += found.tokens
        return found

    monkeypatch.setattr(Held, "taken", taken)
    async with office(rule={"checkpoint_s": 1.0}) as it:
        it.ledger.add("/generate", native(10, 1000))
        await it.site.until("they are kept", lambda: len(it.ledger.marks) == 10)
        assert 2 < len(read_tokens) < 10
        assert max(read_tokens.values()) < 512 < sum(read_tokens.values())


async def test_two_gateways_share_the_rows_of_one_store() -> None:
    async with office() as it:
        other = MemoryRows(it.ledger, "two")
        await other.join()
        runner = runner_of(it.site, other)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(runner.run())
            it.ledger.add(CHAT, bodies(200, 20))
            await it.done()
            runner.drain(0.0)
            await running
        assert it.runner.tally.completed + runner.tally.completed == 200
        assert min(it.runner.tally.completed, runner.tally.completed) > 25
        assert len(it.site.sent) == 2 * 200


async def test_a_line_that_cannot_be_read_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with office() as it:
        whole = it.rows.bodies

        async def broken(rows: Any) -> list[bytes]:
            if any(row.number == 2 for row in rows):
                raise OSError("bad sector")
            return await whole(rows)

        it.runner._bodies = broken
        it.ledger.add(CHAT, bodies(5), within_s=86_400.0)
        await it.done(20_000.0)
        assert it.statuses() == [200, 500, 200, 200, 200]


async def test_a_storage_that_is_away_costs_no_row() -> None:
    async with office() as it:
        whole, is_away = it.rows.bodies, True

        async def broken(rows: Any) -> list[bytes]:
            if is_away:
                raise StorageUnavailable("no route to the bucket")
            return await whole(rows)

        it.runner._bodies = broken
        it.ledger.add(CHAT, bodies(5), within_s=86_400.0)
        await asyncio.sleep(300.0)
        assert not it.ledger.results()
        assert len(it.rows.claims) < 80
        is_away = False
        await it.done(60.0)
        assert it.statuses() == [200] * 5
        assert {entry.row.attempts for entry in it.ledger.entries.values()} == {0}


async def test_what_cannot_be_counted_as_wasted_keeps_no_row_in_memory() -> None:
    async with office() as it:
        calls = []

        async def broken(batch: int, tokens: int) -> None:
            calls.append((batch, tokens))
            raise StorageUnavailable("locked")

        async def fenced(results: Sequence[Result]) -> list[Result]:
            return []

        it.rows.waste, it.rows.finish = broken, fenced  # type: ignore[method-assign]
        it.ledger.add(CHAT, bodies(8))
        await it.site.until("all have ended", lambda: it.runner.tally.fenced == 8, 60.0)
        assert len(it.runner) == 0
        assert sum(tokens for _, tokens in calls) == 8 * 8


async def test_rows_of_a_cancelled_batch_come_back_once_the_store_takes_them() -> None:
    async with office() as it:
        whole, failures = it.rows.release, 0

        async def broken(rows: Sequence[Row], **more: Any) -> int:
            nonlocal failures
            if (failures := failures + 1) <= 3:
                raise StorageUnavailable("locked")
            return await whole(rows, **more)

        it.rows.release = broken  # type: ignore[method-assign]
        it.ledger.add(CHAT, bodies(20, 2000))
        await it.site.until("they run", lambda: it.site.core.placed(Kind.OFFLINE) > 5)
        it.ledger.over.add(1)
        await it.site.until("all are back", lambda: "CLAIMED" not in it.ledger.states(), 30.0)
        assert failures > 3


async def test_a_claim_that_was_not_heard_of_is_freed() -> None:
    async with office() as it:
        whole, failures = it.rows.claim, 0

        async def deaf(room: int) -> list[Row]:
            nonlocal failures
            rows = await whole(room)
            if rows and (failures := failures + 1) <= 2:
                raise StorageUnavailable("the connection is gone")
            return rows

        it.rows.claim = deaf  # type: ignore[method-assign]
        it.ledger.add(CHAT, bodies(20))
        await it.done(60.0)
        assert it.statuses() == [200] * 20
        assert failures > 2
