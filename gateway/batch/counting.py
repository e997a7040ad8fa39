"""The counters of a batch and of a tenant: they change with what they count, in one transaction.

Whoever locks rows does so before it comes here, and batches are locked in their order: so two
gateways cannot wait for each other in a ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, case, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batch.faults import QuotaExceeded
from gateway.batch.objects import TAKES_RESULTS, Batch, Holdings, Quota, Result, Status
from gateway.batch.records import batch_of
from gateway.batch.tables import BATCHES, TENANTS

_TAKES_RESULTS: Final = sorted(TAKES_RESULTS)
_RECENT_US: Final = 60_000_000
"""The recent rate of a batch is that of half a minute to a whole one."""


_MOST_TOKENS: Final = 2**40
"""Of one row: servers say what they like, and the sums have 63 bits."""


def believed(tokens: int) -> int:
    return max(0, min(tokens, _MOST_TOKENS))


@dataclass(slots=True)
class Sum:
    """What the results of one batch add to its counters."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0

    def add(self, result: Result) -> None:
        self.completed += not result.failed
        self.failed += result.failed
        self.prompt_tokens += believed(result.prompt_tokens)
        self.generated_tokens += believed(result.generated_tokens)
        self.cached_tokens += believed(result.cached_tokens)

    @property
    def rows(self) -> int:
        return self.completed + self.failed


async def count_claimed(connection: AsyncConnection, batch: int, rows: int, now_us: int) -> bool:
    """False: the batch does not run any more."""
    batches = BATCHES.c
    changed = await connection.execute(
        update(BATCHES)
        .where(
            batches.seq == batch,
            batches.status == Status.IN_PROGRESS.value,
            batches.deadline_us > now_us,
        )
        .values(claimed=batches.claimed + rows)
    )
    return bool(changed.rowcount)


async def count_back(connection: AsyncConnection, rows_by_batch: Mapping[int, int]) -> None:
    """Rows that are nobody's again."""
    for batch, rows in sorted(rows_by_batch.items()):
        await connection.execute(
            update(BATCHES)
            .where(BATCHES.c.seq == batch)
            .values(claimed=case((BATCHES.c.claimed > rows, BATCHES.c.claimed - rows), else_=0))
        )


async def count_results(
    connection: AsyncConnection, batch: int, results: Sum, now_us: int
) -> Batch | None:
    """None: the batch takes no results any more."""
    batches = BATCHES.c
    span_us = now_us - batches.recent_us
    ages = span_us > _RECENT_US
    found = await connection.execute(
        update(BATCHES)
        .where(batches.seq == batch, batches.status.in_(_TAKES_RESULTS))
        .values(
            completed=batches.completed + results.completed,
            failed=batches.failed + results.failed,
            claimed=batches.claimed - results.rows,
            prompt_tokens=batches.prompt_tokens + results.prompt_tokens,
            generated_tokens=batches.generated_tokens + results.generated_tokens,
            cached_tokens=batches.cached_tokens + results.cached_tokens,
            recent_us=case((ages, now_us - _RECENT_US // 2), else_=batches.recent_us),
            recent_rows=results.rows + _halved(batches.recent_rows, ages, span_us),
            recent_tokens=results.generated_tokens + _halved(batches.recent_tokens, ages, span_us),
        )
        .returning(*BATCHES.c)
    )
    row = found.mappings().one_or_none()
    return None if row is None else batch_of(row)


def _halved(
    counted: ColumnElement[int], ages: ColumnElement[bool], span_us: ColumnElement[int]
) -> ColumnElement[int]:
    """What has aged counts as if it had been spread evenly over its time."""
    return case((ages, counted * (_RECENT_US // 2) // span_us), else_=counted)


# Tenants.


async def book(
    connection: AsyncConnection, tenant: str, add: Holdings, quota: Quota | None = None
) -> None:
    """Adds to what the tenant holds; with a quota, only where that leaves it within."""
    tenants = TENANTS.c
    if await connection.scalar(select(tenants.tenant).where(tenants.tenant == tenant)) is None:
        await connection.execute(
            insert(TENANTS).values(tenant=tenant, stored_bytes=0, open_batches=0, open_rows=0)
        )
    sums = {
        "stored_bytes": tenants.stored_bytes + add.stored_bytes,
        "open_batches": tenants.open_batches + add.open_batches,
        "open_rows": tenants.open_rows + add.open_rows,
    }
    change = update(TENANTS).where(tenants.tenant == tenant).values(sums).returning(*tenants)
    held = (await connection.execute(change)).mappings().one()
    if quota is not None:
        _check(Holdings(**{name: held[name] for name in sums}), add, quota)


def _check(held: Holdings, added: Holdings, quota: Quota) -> None:
    """Raised inside the transaction, it takes the sums back."""
    for name in ("stored_bytes", "open_batches", "open_rows"):
        most = getattr(quota, name)
        if getattr(added, name) > 0 and getattr(held, name) > most:
            what = name.replace("_", " ")
            raise QuotaExceeded(f"this key may have {most} {what} at most")
