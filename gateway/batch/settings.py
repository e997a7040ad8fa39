"""What an operator sets for the Batch API; without a place for its files there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gateway.settings import ConfigError, bounded


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    folder: str = ""
    """Where files and the database of batches lie, beside this file; empty: no Batch API.
    One gateway uses a folder at a time."""
    database: str = ""
    """postgresql://USER:PASSWORD@HOST/NAME, which several gateways may share;
    empty: SQLite in `folder`."""
    files: str = ""
    """Where files lie instead: a folder, or a URL for fsspec such as s3://BUCKET/PREFIX.
    Gateways that share a database share this, too."""
    max_file_mb: float = bounded(200.0, low=0.001)
    """A larger file is answered 413."""
    files_mb_per_s: float = bounded(20.0, low=0.1)
    """Bytes of uploads, downloads and validation a second, all together: faster ones would be
    noticed by online requests."""
    max_rows: int = bounded(50_000, low=1)
    """Requests in one batch."""
    max_window_s: float = bounded(2_592_000.0, low=1)
    """The longest `completion_window` that a batch may ask for."""
    file_expires_s: float = bounded(2_592_000.0, low=0)
    """Input files are deleted after this, unless their upload says otherwise; 0: never."""
    stored_gb: float = bounded(100.0, low=0.000001)
    """Bytes of files that one tenant may have stored."""
    open_batches: int = bounded(1_000, low=1)
    """Batches of one tenant that may be open, and ..."""
    open_rows: int = bounded(5_000_000, low=1)
    """... the requests in them."""
    rows_held: int = bounded(4096, low=1)
    """Rows that this gateway has in memory at most, those at servers among them."""
    checkpoint_s: float = bounded(5.0, low=0.1)
    """So often it is written down what rows have generated, where they can go on from there."""
    drain_s: float = bounded(10.0, low=0)
    """After SIGTERM, rows may end for this long; then others may have them, with what they have."""
    lease_s: float = bounded(20.0, low=1)
    """Others run the rows of a gateway that was silent for so long."""

    @property
    def is_on(self) -> bool:
        return bool(self.folder or self.files)


def check_batch(batch: BatchSettings) -> None:
    if batch.database and not batch.is_on:
        raise ConfigError("batch.database has no place for files: batch.files is missing")
    if batch.files and not (batch.folder or batch.database):
        raise ConfigError(
            "batch.files without a database: batch.folder or batch.database is missing"
        )
    if batch.database.partition(":")[0] not in ("", "postgresql", "postgres"):
        raise ConfigError("batch.database must be postgresql://USER:PASSWORD@HOST/NAME")


def batch_beside(folder: Path, batch: BatchSettings) -> BatchSettings:
    files = batch.files if "://" in batch.files else _in(folder, batch.files)
    return replace(batch, folder=_in(folder, batch.folder), files=files)


def _in(folder: Path, path: str) -> str:
    return str(folder / path) if path else ""
