"""What the Batch API keeps, as values: files, batches, rows and their results."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final


class Purpose(StrEnum):
    INPUT = "batch"
    OUTPUT = "batch_output"


class Status(StrEnum):
    """OpenAI's names for what becomes of a batch."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


TRANSITIONS: Final[dict[Status, frozenset[Status]]] = {
    Status.VALIDATING: frozenset({Status.FAILED, Status.IN_PROGRESS, Status.CANCELLING}),
    Status.IN_PROGRESS: frozenset({Status.FINALIZING, Status.CANCELLING}),
    Status.FINALIZING: frozenset({Status.COMPLETED, Status.EXPIRED}),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
    Status.COMPLETED: frozenset(),
    Status.EXPIRED: frozenset(),
    Status.CANCELLED: frozenset(),
    Status.FAILED: frozenset(),
}
"""A batch whose window ends is finalised too: what has finished is kept."""

OPEN: Final = frozenset(status for status, sequels in TRANSITIONS.items() if sequels)
TAKES_RESULTS: Final = frozenset({Status.IN_PROGRESS, Status.CANCELLING})


class RowState(IntEnum):
    QUEUED = 0
    CLAIMED = 1
    DONE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    id: str
    tenant: str
    name: str
    purpose: Purpose
    size_bytes: int
    lines: int
    """As many requests as it can hold at most."""
    blob: str
    """Where its bytes lie: a key of `Blobs`, never made of what a client has said."""
    created_us: int
    expires_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with a batch, or with one line of its file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def unfinished(self) -> int:
        return self.total - self.completed - self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of the rows that have finished, and those that were generated in vain."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    wasted_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    seq: int
    """Its place in the order of creation; the key of its rows."""
    id: str
    tenant: str
    endpoint: str
    window: str
    """As the client has said it, such as 24h."""
    input_file_id: str
    input_blob: str
    status: Status
    created_us: int
    deadline_us: int
    """The end of its window."""
    model: str = ""
    counts: Counts = Counts()
    claimed: int = 0
    """Rows that run somewhere, or are held to run soon."""
    usage: Usage = Usage()
    metadata: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    output_expires_s: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    moments_us: dict[Status, int] = field(default_factory=dict)
    """When it came into each status that it has been in."""
    ends_as: Status | None = None
    """What it is to become once its files are written."""
    recent_us: int = 0
    """The start of the span over which `recent_rows` and `recent_tokens` were counted."""
    recent_rows: int = 0
    recent_tokens: int = 0

    @property
    def queued(self) -> int:
        return self.counts.unfinished - self.claimed


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What a client asks for, checked."""

    id: str
    """A new one."""
    tenant: str
    endpoint: str
    window: str
    window_us: int
    input_file_id: str
    metadata: dict[str, str]
    output_expires_s: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A line that is fit to run."""

    number: int
    custom_id: str
    offset: int
    length: int
    rank: int
    """Its place in the order of running: lines that begin alike are neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A claimed line: whoever holds it may run it until its fence has moved on."""

    batch: int
    """`Batch.seq`."""
    batch_id: str
    tenant: str
    endpoint: str
    number: int
    """Its line in the input file, from 1."""
    custom_id: str
    blob: str
    offset: int
    length: int
    """Where the line lies in the blob, without its end of line."""
    fence: int
    """Moves with each claim: a result under an older one is refused."""
    attempts: int
    """Claims so far that came to nothing because of a server or a gateway."""
    deadline_us: int
    checkpoint: bytes = b""
    """What the last holder has left of its answer; empty: it starts afresh."""
    checkpoint_tokens: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.batch, self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a row has come to; its line goes into the output file, or into that of errors."""

    row: Row
    failed: bool
    line: bytes
    """One JSON object in OpenAI's form, without an end of line: see lines.py."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A row as it stands when its batch's files are written; no line: it never finished."""

    number: int
    custom_id: str
    failed: bool
    line: bytes | None


class Stage(StrEnum):
    """Work on a whole batch, done by one gateway at a time."""

    VALIDATE = "validate"
    FINALIZE = "finalize"
    PURGE = "purge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    stage: Stage
    batch: Batch
    fence: int
    """Moves with each taking: what is done under an older one is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one tenant may hold at a time."""

    stored_bytes: int
    open_batches: int
    open_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    stored_bytes: int = 0
    open_batches: int = 0
    open_rows: int = 0
