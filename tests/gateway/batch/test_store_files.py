"""Files, blobs, quotas and pages of the store, on each database."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.batch import kept as files_kept
from gateway.batch.faults import Fenced, InUse, NotThere, QuotaExceeded, WrongStatus
from gateway.batch.objects import Holdings, Problem, Purpose, Quota, Stage, Status
from gateway.batch.store import Store
from tests.gateway.batch.conftest import Site
from tests.gateway.batch.stored import (
    PLENTY,
    conclude,
    keep,
    new_batch,
    new_file,
    result,
    run_all,
    running,
    submit,
    taken,
)

pytestmark = pytest.mark.real_time


async def test_what_one_tenant_has_is_not_there_for_another(store: Store) -> None:
    file = await keep(store, new_file("a"))
    batch = await store.add_batch(new_batch(file), PLENTY)
    assert await store.file("a", file.id) == file
    for asking in (
        store.file("b", file.id),
        store.delete_file("b", file.id),
        store.batch("b", batch.id),
        store.cancel("b", batch.id),
        store.add_batch(replace(new_batch(file), tenant="b"), PLENTY),
    ):
        with pytest.raises(NotThere):
            await asking
    assert await store.files("b", limit=9) == ([], False)
    assert await store.batches("b", limit=9) == ([], False)


async def test_pages_follow_each_other_in_either_order(store: Store) -> None:
    files = [await keep(store, new_file()) for _ in range(5)]
    first, more = await store.files("a", limit=2, order="asc")
    assert (first, more) == (files[:2], True)
    second, more = await store.files("a", limit=9, order="asc", after=first[-1].id)
    assert (second, more) == (files[2:], False)
    newest, _ = await store.files("a", limit=2)
    assert newest == [files[4], files[3]]
    with pytest.raises(NotThere):
        await store.files("a", limit=2, after="file-unknown")


@pytest.mark.parametrize("limit", [2, 3, 4, 6, 7, 9])
async def test_a_long_page_is_read_in_slices(
    store: Store, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(files_kept, "_SLICE", 3)
    files = [await keep(store, new_file()) for _ in range(7)]
    assert await store.files("a", limit=limit, order="asc") == (files[:limit], limit < 7)
    newest = files[-2::-1]
    assert await store.files("a", limit=limit, after=files[-1].id) == (newest[:limit], limit < 6)


async def test_pages_may_be_of_one_purpose(store: Store) -> None:
    await keep(store, new_file())
    made = await keep(store, new_file(purpose=Purpose.OUTPUT))
    assert (await store.files("a", limit=9, purpose=Purpose.OUTPUT))[0] == [made]


async def test_batches_come_newest_first(store: Store) -> None:
    made = [(await submit(store)).id for _ in range(3)]
    page, more = await store.batches("a", limit=2)
    assert ([batch.id for batch in page], more) == ([made[2], made[1]], True)
    rest, more = await store.batches("a", limit=2, after=page[-1].id)
    assert ([batch.id for batch in rest], more) == ([made[0]], False)


async def test_a_file_needs_its_blob_announced(store: Store) -> None:
    with pytest.raises(Fenced):
        await store.add_file(new_file(), PLENTY)


async def test_what_was_begun_and_never_kept_is_litter_after_a_while(
    site: Site, store: Store
) -> None:
    file = new_file()
    await store.announce(file.blob)
    assert await store.litter(9) == []
    site.wait(200)
    await store.hold(file.blob)
    site.wait(200)
    assert await store.litter(9) == []
    site.wait(200)
    assert await store.litter(9) == [file.blob]
    with pytest.raises(Fenced):
        await store.hold(file.blob)
    with pytest.raises(Fenced):
        await store.add_file(file, PLENTY)
    await store.forget([file.blob])
    assert await store.litter(9) == []


async def test_a_blob_that_is_a_file_by_now_cannot_be_doomed(store: Store) -> None:
    file = await keep(store, new_file())
    await store.doom([file.blob])
    assert await store.litter(9) == []


async def test_alone_what_a_crash_has_left_is_litter_at_once(site: Site) -> None:
    killed = await site.store()
    await killed.announce("blob-half")
    again = await site.store(alone=True)
    assert await again.litter(9) == ["blob-half"]


async def test_a_deleted_file_leaves_its_blob_as_litter_and_its_bytes_are_free(
    store: Store,
) -> None:
    file = await keep(store, new_file())
    await store.delete_file("a", file.id)
    assert await store.litter(9) == [file.blob]
    assert await store.holdings("a") == Holdings()
    with pytest.raises(NotThere):
        await store.delete_file("a", file.id)


async def test_a_file_that_a_batch_is_made_of_stays_until_its_end(store: Store) -> None:
    batch = await running(store, rows=1)
    with pytest.raises(InUse):
        await store.delete_file("a", batch.input_file_id)
    await run_all(store)
    await conclude(store)
    await store.delete_file("a", batch.input_file_id)


async def test_a_file_past_its_time_is_gone_unless_a_batch_reads_it(
    site: Site, store: Store
) -> None:
    late = site.now_us + 1_000_000
    idle = await keep(store, new_file(expires_us=late))
    read = await keep(store, new_file(expires_us=late))
    await store.add_batch(new_batch(read), PLENTY)
    assert await store.expire_files() == 0
    site.wait(1)
    with pytest.raises(NotThere):
        await store.file("a", idle.id)
    with pytest.raises(NotThere):
        await store.add_batch(new_batch(idle), PLENTY)
    assert await store.expire_files() == 1
    assert await store.litter(9) == [idle.blob]


async def test_output_files_are_no_input(store: Store) -> None:
    made = await keep(store, new_file(purpose=Purpose.OUTPUT))
    with pytest.raises(NotThere):
        await store.add_batch(new_batch(made), PLENTY)


@pytest.mark.parametrize(
    "quota",
    [
        Quota(stored_bytes=150, open_batches=9, open_rows=9),
        Quota(stored_bytes=999, open_batches=1, open_rows=9),
        Quota(stored_bytes=999, open_batches=9, open_rows=5),
    ],
    ids=["bytes", "batches", "rows"],
)
async def test_a_tenant_has_no_more_than_its_quota(store: Store, quota: Quota) -> None:
    """And what was refused has left nothing."""
    await store.add_batch(new_batch(await keep(store, new_file(), quota)), quota)
    held: list[Holdings] = []

    async def more() -> None:
        held.append(await store.holdings("a"))
        second = await keep(store, new_file(), quota)
        held.append(await store.holdings("a"))
        await store.add_batch(new_batch(second), quota)

    with pytest.raises(QuotaExceeded):
        await more()
    assert await store.holdings("a") == held[-1]
    await keep(store, new_file("b"), quota)


async def test_what_a_batch_takes_of_the_quota_is_free_when_it_ends(store: Store) -> None:
    await running(store, rows=2)
    await submit(store, rows=3)
    assert (await store.holdings("a")).open_rows == 5
    await run_all(store)
    await conclude(store)
    task = await taken(store, Stage.VALIDATE)
    await store.fail(task, [Problem(code="empty_batch", message="nothing")])
    held = await store.holdings("a")
    assert (held.open_batches, held.open_rows, held.stored_bytes) == (0, 0, 300)


async def test_a_failed_batch_says_why_and_its_rows_are_purged(store: Store) -> None:
    batch = await submit(store)
    problems = (Problem(code="url_mismatch", message="url", line=3, param="url"),)
    await store.fail(await taken(store, Stage.VALIDATE), problems)
    found = await store.batch("a", batch.id)
    assert (found.status, found.problems) == (Status.FAILED, problems)
    assert (await taken(store, Stage.PURGE)).batch.id == batch.id


async def test_what_has_ended_cannot_be_cancelled(store: Store) -> None:
    batch = await running(store, rows=1)
    await run_all(store)
    with pytest.raises(WrongStatus):
        await store.cancel("a", batch.id)
    await conclude(store)
    with pytest.raises(WrongStatus):
        await store.cancel("a", batch.id)


async def test_cancelled_twice_is_cancelled(store: Store) -> None:
    batch = await running(store)
    first = await store.cancel("a", batch.id)
    assert await store.cancel("a", batch.id) == first


async def test_a_conclusion_that_fails_leaves_the_batch_as_it_was(store: Store) -> None:
    """Its error file was not announced."""
    batch = await running(store, rows=1)
    await run_all(store)
    task = await taken(store, Stage.FINALIZE)
    output = new_file(purpose=Purpose.OUTPUT)
    await store.announce(output.blob)
    with pytest.raises(Fenced):
        await store.conclude(task, output=output, errors=new_file(purpose=Purpose.OUTPUT))
    found = await store.batch("a", batch.id)
    assert (found.status, found.output_file_id) == (Status.FINALIZING, None)
    with pytest.raises(NotThere):
        await store.file("a", output.id)


async def test_moments_are_those_of_the_moves(site: Site, store: Store) -> None:
    batch = await running(store, rows=1)
    site.wait(5)
    await store.finish([result(row) for row in await store.claim(1)])
    site.wait(5)
    moments = (await conclude(store)).moments_us
    assert moments[Status.FINALIZING] - batch.created_us == 5_000_000
    assert moments[Status.COMPLETED] - batch.created_us == 10_000_000


async def test_open_batches_are_those_of_everybody(store: Store) -> None:
    await running(store, "a", rows=1)
    await run_all(store)
    await conclude(store)
    open_ = [await running(store, "b"), await submit(store, "c")]
    assert [one.id for one in await store.open_batches()] == [one.id for one in open_]
