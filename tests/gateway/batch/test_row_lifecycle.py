"""Whatever gateways do, and whenever they die: a row has one holder and one result."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import func, select

from gateway.batch.faults import LeaseLost, WrongStatus
from gateway.batch.objects import OPEN, TAKES_RESULTS, Row, RowState, Stage, Status
from gateway.batch.store import Store
from gateway.batch.tables import RESULTS, ROWS
from tests.gateway.batch.stored import conclude, result, running

T = TypeVar("T")

LEASE_US = 10_000_000
GATEWAYS = st.integers(0, 1)
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


class Lifecycle(RuleBasedStateMachine):
    """Two gateways on one database, and what each of them believes to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.mkdtemp(dir=MEMORY)
        self.now_us = 1_000_000_000
        self.stores: list[Store] = []
        self.held: list[list[Row]] = [[], []]
        self.done: dict[tuple[int, int], int] = {}
        self.batches: dict[int, str] = {}
        self.names = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def _store(self) -> Store:
        self.names += 1
        store = await Store.open(
            f"sqlite+aiosqlite:///{self.folder}/x",
            owner=f"gateway-{self.names}",
            now_us=lambda: self.now_us,
            lease_us=LEASE_US,
            alone=False,
        )
        await store.join()
        return store

    @initialize()
    def start(self) -> None:
        self.stores = [self.do(self._store()) for _ in range(2)]

    @rule(rows=st.integers(1, 4), tenant=st.sampled_from("ab"), window_s=st.sampled_from([30, 999]))
    def submit(self, rows: int, tenant: str, window_s: int) -> None:
        batch = self.do(running(self.stores[0], tenant, rows, window_us=window_s * 1_000_000))
        self.batches[batch.seq] = batch.id

    @rule(who=GATEWAYS, room=st.integers(1, 5))
    def claim(self, who: int, room: int) -> None:
        try:
            self.held[who] += self.do(self.stores[who].claim(room))
        except LeaseLost:
            self._lost(who)

    def _lost(self, who: int) -> None:
        self.held[who] = []
        self.do(self.stores[who].join())

    @rule(who=GATEWAYS, count=st.integers(1, 4), failed=st.sampled_from([0, 1]))
    def finish(self, who: int, count: int, failed: int) -> None:
        """Some of what it holds, or believes to hold; told twice as after a lost answer."""
        rows = self.held[who][:count]
        told = [result(row, failed=bool(failed)) for row in rows]
        accepted = self.do(self.stores[who].finish(told))
        assert self.do(self.stores[who].finish(told)) == []
        for one in accepted:
            self.done[one.row.key] = self.done.get(one.row.key, 0) + 1
        self.held[who] = self.held[who][count:]

    @rule(who=GATEWAYS, count=st.integers(1, 4))
    def release(self, who: int, count: int) -> None:
        self.do(self.stores[who].release(self.held[who][:count]))
        self.held[who] = self.held[who][count:]

    @rule(who=GATEWAYS)
    def keep_a_checkpoint(self, who: int) -> None:
        self.do(self.stores[who].checkpoint([(row, b"x", 1) for row in self.held[who]]))

    @rule(who=GATEWAYS)
    def beat(self, who: int) -> None:
        try:
            self.do(self.stores[who].renew())
        except LeaseLost:
            self._lost(who)

    @rule(seconds=st.sampled_from([1, 6, 20]))
    def wait(self, seconds: int) -> None:
        self.now_us += seconds * 1_000_000

    @rule(who=GATEWAYS)
    def reap(self, who: int) -> None:
        self.do(self.stores[who].reap())
        self.do(self.stores[who].close_windows())

    @rule(who=GATEWAYS)
    def kill(self, who: int) -> None:
        """Another process comes; the old one's lease has to run out."""
        self.do(self.stores[who].close())
        self.stores[who], self.held[who] = self.do(self._store()), []

    @rule(who=GATEWAYS)
    def leave(self, who: int) -> None:
        self.do(self.stores[who].leave())
        self._lost(who)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.batches:
            return
        batch_id = self.batches[data.draw(st.sampled_from(sorted(self.batches)))]
        for tenant in "ab":
            page, _ = self.do(self.stores[0].batches(tenant, limit=99))
            if batch_id in [batch.id for batch in page]:
                try:
                    self.do(self.stores[0].cancel(tenant, batch_id))
                except WrongStatus:
                    return

    @rule()
    def finalize(self) -> None:
        async def any_work() -> None:
            store = self.stores[0]
            task = await store.take(Stage.FINALIZE)
            if task is None:
                return
            await store.put_back(task)
            ended = await conclude(store)
            counts = ended.counts
            assert counts.completed + counts.failed == counts.total
            assert sum(key[0] == ended.seq for key in self.done) <= counts.total
            if ended.status is Status.COMPLETED:
                assert sum(key[0] == ended.seq for key in self.done) == counts.total

        try:
            self.do(any_work())
        except LeaseLost:
            self._lost(0)

    @invariant()
    def no_row_is_done_twice(self) -> None:
        assert set(self.done.values()) <= {1}

    @invariant()
    def counters_are_what_the_rows_say(self) -> None:
        if self.stores:
            self.do(self._check_counters())

    async def _check_counters(self) -> None:
        store = self.stores[0]
        async with store._database.reading() as connection:
            states = await connection.execute(
                select(ROWS.c.batch, ROWS.c.state, func.count()).group_by(
                    ROWS.c.batch, ROWS.c.state
                )
            )
            found = {(batch, RowState(state)): number for batch, state, number in states}
            rows = await connection.execute(select(RESULTS.c.batch, RESULTS.c.number))
            assert {(batch, number) for batch, number in rows} == set(self.done)
        for batch in await store.open_batches():
            if batch.status in TAKES_RESULTS:
                assert batch.claimed == found.get((batch.seq, RowState.CLAIMED), 0)
                finished = batch.counts.completed + batch.counts.failed
                assert finished == found.get((batch.seq, RowState.DONE), 0)
            assert batch.status in OPEN

    def teardown(self) -> None:
        for store in self.stores:
            self.do(store.close())
        self.loop.close()
        shutil.rmtree(self.folder)


Lifecycle.TestCase.settings = settings(max_examples=8, stateful_step_count=25, deadline=None)
TestLifecycle = pytest.mark.timeout(120)(Lifecycle.TestCase)
