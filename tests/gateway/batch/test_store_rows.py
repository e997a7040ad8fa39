"""The life of rows, on each database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.batch.faults import Fenced, LeaseLost
from gateway.batch.objects import Stage, Status
from gateway.batch.store import Store
from tests.gateway.batch.conftest import Site
from tests.gateway.batch.stored import (
    conclude,
    new_rows,
    result,
    run_all,
    running,
    submit,
    taken,
)

pytestmark = pytest.mark.real_time


async def test_a_batch_runs_from_its_rows_to_its_files(store: Store) -> None:
    batch = await running(store, rows=5)
    rows = await run_all(store, room=2)
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert (await store.batch("a", batch.id)).status is Status.FINALIZING
    ended = await conclude(store)
    assert (ended.status, ended.counts.completed, ended.counts.failed) == (Status.COMPLETED, 5, 0)
    assert ended.usage.prompt_tokens == 35


async def test_rows_of_a_batch_that_is_still_validated_are_not_claimed(store: Store) -> None:
    await submit(store)
    await store.add_rows(await taken(store, Stage.VALIDATE), new_rows(3))
    assert await store.claim(10) == []


async def test_a_row_is_claimed_by_one_gateway(site: Site) -> None:
    one, other = await site.store(), await site.store()
    await running(one, rows=4)
    first, second = await one.claim(3), await other.claim(3)
    assert [row.number for row in first + second] == [1, 2, 3, 4]


async def test_a_result_counts_once_however_often_it_is_told(store: Store) -> None:
    batch = await running(store, rows=2)
    row = (await store.claim(1))[0]
    told = [result(row), result(row, failed=True)]
    assert await store.finish(told) == told[:1]
    assert await store.finish(told) == []
    counts = (await store.batch("a", batch.id)).counts
    assert (counts.completed, counts.failed) == (1, 0)


async def test_what_failed_is_counted_apart(store: Store) -> None:
    batch = await running(store, rows=2)
    good, bad = await store.claim(2)
    await store.finish([result(good), result(bad, failed=True)])
    counts = (await store.batch("a", batch.id)).counts
    assert (counts.completed, counts.failed) == (1, 1)


async def test_counts_of_a_server_that_cannot_be_are_bounded(store: Store) -> None:
    batch = await running(store, rows=2)
    for row, tokens in zip(await store.claim(2), (2**70, -5), strict=True):
        told = replace(result(row, tokens=tokens), prompt_tokens=2**63, cached_tokens=tokens)
        assert len(await store.finish([told])) == 1
    await store.waste(batch.seq, 2**64)
    usage = (await store.batch("a", batch.id)).usage
    assert usage.prompt_tokens == 2**41
    assert usage.generated_tokens == usage.cached_tokens == usage.wasted_tokens == 2**40


async def test_a_silent_gateway_loses_its_rows_and_its_results_are_refused(site: Site) -> None:
    silent, other = await site.store(), await site.store()
    await running(other, rows=2)
    held = await silent.claim(2)
    site.wait(11)
    await other.renew()
    assert await other.reap() == 2
    again = await other.claim(2)
    assert [row.attempts for row in again] == [1, 1]
    assert await silent.finish([result(row) for row in held]) == []
    with pytest.raises(LeaseLost):
        await silent.renew()
    assert len(await other.finish([result(row) for row in again])) == 2


async def test_a_gateway_that_lost_its_lease_claims_nothing_until_it_joins_again(
    site: Site,
) -> None:
    silent, other = await site.store(), await site.store()
    await running(other)
    site.wait(11)
    await other.renew()
    await other.reap()
    with pytest.raises(LeaseLost):
        await silent.claim(1)
    await silent.join()
    assert len(await silent.claim(9)) == 3


async def test_a_heartbeat_keeps_what_is_held(site: Site) -> None:
    one, other = await site.store(), await site.store()
    await running(one)
    held = await one.claim(3)
    for _ in range(4):
        site.wait(6)
        await one.renew()
        assert await other.reap() == 0
    assert len(await one.finish([result(row) for row in held])) == 3


async def test_who_leaves_gives_back_what_it_holds_without_blame(site: Site) -> None:
    one, other = await site.store(), await site.store()
    batch = await running(one)
    await one.claim(2)
    await one.leave()
    assert (await other.batch("a", batch.id)).claimed == 0
    assert {row.attempts for row in await other.claim(9)} == {0}


async def test_a_gateway_alone_on_its_database_frees_at_once_what_was_held(site: Site) -> None:
    killed = await site.store()
    await running(killed)
    await killed.claim(2)
    again = await site.store(alone=True)
    assert len(await again.claim(9)) == 3


async def test_a_released_row_waits_for_its_time(site: Site, store: Store) -> None:
    await running(store, rows=1)
    rows = await store.claim(1)
    assert await store.release(rows, not_before_us=site.now_us + 1_000_000) == 1
    assert await store.claim(1) == []
    site.wait(1)
    assert (await store.claim(1))[0].attempts == 1


async def test_rows_that_wait_do_not_keep_the_rows_of_others_waiting(
    site: Site, store: Store
) -> None:
    """However urgent their batch is."""
    await running(store, rows=3, window_us=60_000_000)
    rows = await store.claim(3)
    await running(store, rows=2)
    await store.release(rows, not_before_us=site.now_us + 30_000_000)
    assert {row.batch for row in await store.claim(2)} != {rows[0].batch}


async def test_a_released_row_can_no_longer_be_finished(store: Store) -> None:
    await running(store, rows=1)
    rows = await store.claim(1)
    await store.release(rows)
    assert await store.finish([result(rows[0])]) == []
    assert await store.release(rows) == 0


async def test_the_next_to_claim_finds_the_checkpoint(store: Store) -> None:
    await running(store, rows=1)
    rows = await store.claim(1)
    await store.checkpoint([(rows[0], b"one", 1)])
    await store.checkpoint([(rows[0], b"two", 2)])
    await store.release(rows, blameless=True)
    again = (await store.claim(1))[0]
    assert (again.checkpoint, again.checkpoint_tokens, again.attempts) == (b"two", 2, 0)


async def test_a_checkpoint_under_an_old_fence_is_passed_over(store: Store) -> None:
    await running(store, rows=1)
    old = await store.claim(1)
    await store.release(old)
    await store.claim(1)
    await store.checkpoint([(old[0], b"stale", 9)])
    await store.leave()
    await store.join()
    assert (await store.claim(1))[0].checkpoint == b""


async def test_a_cancelled_batch_ends_once_its_rows_have(store: Store) -> None:
    batch = await running(store, rows=3)
    first, second = await store.claim(2)
    assert (await store.cancel("a", batch.id)).status is Status.CANCELLING
    assert await store.claim(9) == []
    assert await store.overdue([first, second]) == [first, second]
    assert len(await store.finish([result(first)])) == 1
    assert await store.take(Stage.FINALIZE) is None
    await store.release([second])
    ended = await conclude(store, errors=True)
    assert (ended.status, ended.counts.completed, ended.counts.failed) == (Status.CANCELLED, 1, 2)


async def test_a_window_that_ends_keeps_what_has_finished(site: Site, store: Store) -> None:
    batch = await running(store, rows=3, window_us=5_000_000)
    first, second = await store.claim(2)
    await store.finish([result(first)])
    site.wait(5)
    assert await store.overdue([second]) == [second]
    assert await store.claim(9) == []
    assert await store.close_windows() == 1
    assert await store.finish([result(second)]) == []
    found = await store.recorded(await taken(store, Stage.FINALIZE), after=0, limit=10)
    assert [(one.number, one.line is None) for one in found] == [(1, False), (2, True), (3, True)]
    assert (await store.batch("a", batch.id)).ends_as is Status.EXPIRED


async def test_what_is_recorded_comes_in_slices(store: Store) -> None:
    await running(store, rows=5)
    await run_all(store)
    task = await taken(store, Stage.FINALIZE)
    slices = [await store.recorded(task, after=after, limit=2) for after in (0, 2, 4, 5)]
    assert [[one.number for one in slice_of] for slice_of in slices] == [[1, 2], [3, 4], [5], []]


async def test_work_on_a_batch_has_one_holder(site: Site) -> None:
    one, other = await site.store(), await site.store()
    await submit(one)
    task = await taken(one, Stage.VALIDATE)
    assert await other.take(Stage.VALIDATE) is None
    await one.put_back(task)
    again = await taken(other, Stage.VALIDATE)
    with pytest.raises(Fenced):
        await one.add_rows(task, new_rows(3))
    assert again.fence > task.fence


async def test_whoever_validates_a_batch_that_is_cancelled_is_fenced_off(store: Store) -> None:
    batch = await submit(store)
    task = await taken(store, Stage.VALIDATE)
    await store.add_rows(task, new_rows(2))
    await store.cancel("a", batch.id)
    with pytest.raises(Fenced):
        await store.add_rows(task, new_rows(1, start=3))
    finalizing = await taken(store, Stage.FINALIZE)
    assert await store.recorded(finalizing, after=0, limit=9) == []


async def test_a_dead_gateways_work_on_a_batch_is_taken_over(site: Site) -> None:
    dead, other = await site.store(), await site.store()
    await running(dead, rows=1)
    await run_all(dead)
    stale = await taken(dead, Stage.FINALIZE)
    site.wait(11)
    await other.renew()
    await other.reap()
    await conclude(other)
    with pytest.raises(Fenced):
        await dead.conclude(stale, output=None, errors=None)


async def test_after_the_end_rows_are_purged_in_slices(store: Store) -> None:
    await running(store, rows=5)
    await run_all(store)
    await conclude(store)
    task = await taken(store, Stage.PURGE)
    assert [await store.drop_rows(task, 3) for _ in range(3)] == [3, 2, 0]
    await store.purged(task)
    assert await store.take(Stage.PURGE) is None


async def test_the_recent_rate_forgets_what_is_long_ago(site: Site, store: Store) -> None:
    batch = await running(store, rows=4)
    for row in await store.claim(4):
        await store.finish([result(row)])
        site.wait(300)
    found = await store.batch("a", batch.id)
    assert found.recent_rows == 1
    assert found.recent_us == site.now_us - 330_000_000


async def test_work_that_could_not_be_put_back_is_taken_again(store: Store) -> None:
    await submit(store)
    lost = await taken(store, Stage.VALIDATE)
    again = await taken(store, Stage.VALIDATE)
    assert again.batch.seq == lost.batch.seq
    with pytest.raises(Fenced):
        await store.begin(lost, model="m", total=3)


async def test_work_that_always_fails_holds_up_no_other_batch(store: Store) -> None:
    first, second = await submit(store), await submit(store)
    seen = []
    for _ in range(3):
        task = await taken(store, Stage.VALIDATE)
        seen.append(task.batch.seq)
        await store.put_back(task)
    assert seen == [first.seq, second.seq, first.seq]


async def test_what_is_claimed_without_our_knowing_is_freed(site: Site, store: Store) -> None:
    batch, other = await running(store, rows=5), await site.store()
    known, _ = await store.claim(1), await store.claim(2)
    theirs = await other.claim(1)
    assert await store.keep_only(known) == 2
    assert (await store.batch("a", batch.id)).claimed == 2
    assert [row.number for row in await store.claim(9)] == [2, 3, 5]
    assert len(await store.finish([result(known[0])])) == 1
    assert len(await other.finish([result(theirs[0])])) == 1
