"""The tables, on SQLite and PostgreSQL alike, and how an older database becomes this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    insert,
    select,
    text,
    update,
)

from gateway.batch.faults import WrongVersion

Migration = Callable[[Connection], None]

METADATA: Final = MetaData()
_LOCK: Final = 0x51AC4BA7
_SEQ: Final = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers its rows by itself only in a column of this very type."""


def _key_of_row() -> tuple[Column[int], ...]:
    """Its batch's number, and its own line."""
    return (
        Column("batch", BigInteger, primary_key=True, autoincrement=False),
        Column("number", Integer, primary_key=True, autoincrement=False),
    )


FILES: Final = Table(
    "slackwater_files",
    METADATA,
    Column("seq", _SEQ, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("lines", BigInteger, nullable=False),
    Column("blob", String(64), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("readers", Integer, nullable=False, server_default="0"),
    Index("slackwater_files_of_tenant", "tenant", "seq"),
    Index("slackwater_files_by_expiry", "expires_us"),
    sqlite_autoincrement=True,
)
"""`readers`: open batches that are made of this file."""

BATCHES: Final = Table(
    "slackwater_batches",
    METADATA,
    Column("seq", _SEQ, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", Text, nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("window_name", String(32), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("input_blob", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("ends_as", String(16)),
    Column("created_us", BigInteger, nullable=False),
    Column("deadline_us", BigInteger, nullable=False),
    Column("model", Text, nullable=False, server_default=""),
    Column("booked_rows", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False, server_default="0"),
    Column("completed", BigInteger, nullable=False, server_default="0"),
    Column("failed", BigInteger, nullable=False, server_default="0"),
    Column("claimed", BigInteger, nullable=False, server_default="0"),
    Column("prompt_tokens", BigInteger, nullable=False, server_default="0"),
    Column("generated_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cached_tokens", BigInteger, nullable=False, server_default="0"),
    Column("wasted_tokens", BigInteger, nullable=False, server_default="0"),
    Column("metadata", Text, nullable=False, server_default="{}"),
    Column("problems", Text, nullable=False, server_default="[]"),
    Column("moments", Text, nullable=False, server_default="{}"),
    Column("output_expires_s", BigInteger),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("recent_us", BigInteger, nullable=False, server_default="0"),
    Column("recent_rows", BigInteger, nullable=False, server_default="0"),
    Column("recent_tokens", BigInteger, nullable=False, server_default="0"),
    Column("stage", String(16)),
    Column("task_owner", String(96)),
    Column("task_fence", Integer, nullable=False, server_default="0"),
    Index("slackwater_batches_of_tenant", "tenant", "seq"),
    Index("slackwater_batches_by_status", "status", "seq"),
    Index("slackwater_batches_by_stage", "stage", "seq"),
    sqlite_autoincrement=True,
)
"""Counters are kept with each change: nothing is ever counted by looking at the rows.

`booked_rows`: what the batch takes of its tenant's quota while it is open.
"""

ROWS: Final = Table(
    "slackwater_rows",
    METADATA,
    *_key_of_row(),
    Column("custom_id", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("length", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("state", SmallInteger, nullable=False, server_default="0"),
    Column("owner", String(96)),
    Column("fence", Integer, nullable=False, server_default="0"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("not_before_us", BigInteger, nullable=False, server_default="0"),
    Index("slackwater_rows_to_run", "batch", "state", "rank"),
    Index(
        "slackwater_rows_held",
        "owner",
        sqlite_where=text("owner IS NOT NULL"),
        postgresql_where=text("owner IS NOT NULL"),
    ),
    sqlite_with_rowid=False,
)

CHECKPOINTS: Final = Table(
    "slackwater_checkpoints",
    METADATA,
    *_key_of_row(),
    Column("tokens", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

RESULTS: Final = Table(
    "slackwater_results",
    METADATA,
    *_key_of_row(),
    Column("failed", Boolean, nullable=False),
    Column("line", LargeBinary, nullable=False),
)
"""The key lets a row have one result and no second."""

OWNERS: Final = Table(
    "slackwater_owners",
    METADATA,
    Column("owner", String(96), primary_key=True),
    Column("until_us", BigInteger, nullable=False),
    Column("dead", Boolean, nullable=False),
)

BLOBS: Final = Table(
    "slackwater_blobs",
    METADATA,
    Column("blob", String(64), primary_key=True),
    Column("until_us", BigInteger, nullable=False),
    Index("slackwater_blobs_by_time", "until_us"),
)
"""Blobs that no file is made of: not yet, or not any more."""

TENANTS: Final = Table(
    "slackwater_tenants",
    METADATA,
    Column("tenant", Text, primary_key=True),
    Column("stored_bytes", BigInteger, nullable=False),
    Column("open_batches", BigInteger, nullable=False),
    Column("open_rows", BigInteger, nullable=False),
)

SCHEMA: Final = Table("slackwater_schema", METADATA, Column("version", Integer, nullable=False))

VERSION: Final = 1
MIGRATIONS: Final[Mapping[int, Migration]] = {}
"""What makes each version out of the one before it; a new database starts with the last."""


def migrate(
    connection: Connection,
    *,
    version: int = VERSION,
    steps: Mapping[int, Migration] = MIGRATIONS,
) -> None:
    """To be called in a transaction: gateways that start together wait for each other here."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    METADATA.create_all(connection, tables=[SCHEMA])
    found = connection.scalar(select(SCHEMA.c.version))
    if found is None:
        METADATA.create_all(connection)
        connection.execute(insert(SCHEMA).values(version=version))
        return
    if found > version:
        message = f"the database is of version {found}, this gateway knows {version}"
        raise WrongVersion(f"{message}: a newer gateway has used it")
    for step in range(found + 1, version + 1):
        steps[step](connection)
    connection.execute(update(SCHEMA).values(version=version))
