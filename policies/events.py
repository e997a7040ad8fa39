"""Everything that can happen, and everything that can be decided about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from policies.step_line import SeenStep
from policies.steps import Counters
from policies.types import Job, Role, Worker


class Fault(StrEnum):
    """Why an attempt ended without an answer."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    DIED = "died"
    BUSY = "busy"
    ENGINE = "engine_error"
    PAIRING = "pairing_failed"
    REQUEST = "bad_request"
    """The request itself is at fault: no server is to blame and no other will do better."""


class Reason(StrEnum):
    """Why a decision was taken; it reaches the log, the metrics and the client."""

    LEAST_WORK = "least_work"
    RETRY = "retry"
    RESUME = "resume"
    REQUEUED = "requeued"
    """It goes again after it was preempted before its first token."""
    RECALLED = "recalled"
    """Somebody asked for its place."""
    ONLINE_PREFILL = "online_prefill"
    """Its prompt was in the way of an online one."""
    ONLINE_DECODE = "online_decode"
    """An online job needed its seat or its memory."""
    STEP_TIME = "step_time"
    """With it the steps of online jobs took too long."""
    PULLED = "pulled"
    """A strict server has room for it."""
    NEXT_PART = "next_part"
    """Its beginning is in the cache of a server: now comes what is next of it."""
    ROLE_SWITCH = "role_switch"
    """Its server is about to take another role."""
    STOOD_STILL = "stood_still"
    """Its server had to stand still for online work for too long."""
    DISPLACED = "displaced"
    """A more urgent prompt has its prefill server."""
    QUEUE_FULL = "queue_full"
    NO_WORKER = "no_worker"
    NO_RELAXED = "no_relaxed_worker"
    """No server of its pool is in rotation, and it is not to wait for one."""
    UNAVAILABLE = "workers_unavailable"
    HOPELESS = "deadline_hopeless"
    EXPIRED = "deadline_passed"
    TOO_LARGE = "request_too_large"
    CLIENT_LEFT = "client_left"
    ATTEMPTS = "attempts_exhausted"
    RETRY_BUDGET = "retry_budget_spent"
    NOT_RESUMABLE = "not_resumable"
    BAD_REQUEST = "bad_request"


class Outcome(StrEnum):
    """How a role switch ended, or why it was not begun."""

    DONE = "done"
    FAILED = "failed"
    """It was refused or did not happen: the server serves on as what it is."""
    BUSY = "not_empty_in_time"
    LAST = "last_of_its_role"
    LOST = "does_not_answer"
    HANGS = "hangs"
    """It is not over in time; the server stays out of rotation until it says what it is."""
    TAKEN = "switched_by_another"
    """Nothing was asked for: it was no longer what it was when this was decided."""
    GONE = "taken_off_the_list"
    MOVING = "moves_already"
    SAME = "has_that_role"
    UNIFIED = "unified"
    UNKNOWN = "not_there"


@dataclass(frozen=True, slots=True)
class Load:
    """What a server says of itself; a snapshot that was true at `seen_us`."""

    seen_us: int
    running: int
    waiting: int
    used_tokens: int
    total_tokens: int
    capacity_tokens: int = 0
    max_running: int = 0
    waiting_uncached_tokens: int = 0
    counters: Counters | None = None


@dataclass(frozen=True, slots=True)
class Arrived:
    job: Job


@dataclass(frozen=True, slots=True)
class Left:
    """The client went away; nobody waits for this job any more."""

    job_id: str


@dataclass(frozen=True, slots=True)
class PrefillDone:
    job_id: str


@dataclass(frozen=True, slots=True)
class FirstToken:
    job_id: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens of each job in its present attempt, told once a tick for all that moved."""

    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Finished:
    job_id: str
    generated: int
    """Tokens of the attempt that ended well; those of earlier ones were told with their ends."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt is over, both its legs are closed, and there is no answer."""

    job_id: str
    fault: Fault
    blamed: tuple[str, ...] = ()
    generated: int = 0
    restartable: bool = True
    """A new attempt can take over without the client noticing."""


@dataclass(frozen=True, slots=True)
class Freed:
    """Both legs of a stopped attempt are closed."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Recall:
    """Somebody wants this job's place; it goes on later. Asked of a job that waits: nothing."""

    job_id: str
    reason: Reason = Reason.RECALLED


@dataclass(frozen=True, slots=True)
class Preempted:
    """Both legs of a preempted attempt are closed."""

    job_id: str
    generated: int = 0
    """Tokens of this attempt that are kept."""
    lost: int = 0
    """Tokens of this attempt that have to be made again."""


@dataclass(frozen=True, slots=True)
class PartDone:
    """Both legs of a part have ended well, and the cache holds it. Nobody was told anything."""

    job_id: str
    is_cut: bool = True
    """False: nothing was sent, because nobody can tell where the prompt could be cut."""
    prompt_tokens: int = 0
    """Of the whole prompt, where they have been counted; before, it was an estimate."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    worker: str
    load: Load


@dataclass(frozen=True, slots=True)
class StepsSeen:
    """A server has told of decode steps, each with who was in it."""

    worker: str
    steps: tuple[SeenStep, ...]


@dataclass(frozen=True, slots=True)
class WorkerUp:
    worker: Worker


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """Out of rotation: it does not answer its probes."""

    name: str


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """Nothing new goes there: what it has may end."""

    name: str
    draining: bool = True
    """False: it is wanted back."""


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """Taken off the list; what it still runs may end."""

    name: str


@dataclass(frozen=True, slots=True)
class SwitchWanted:
    """A server is to take another role, or to leave, once it is empty."""

    worker: str
    role: Role | None
    """None: it is to be given back."""
    why: str


@dataclass(frozen=True, slots=True)
class RoleSwitched:
    """A switch is over; the role is the one that the server was asked for afterwards."""

    worker: str
    role: Role | None
    """None: it does not answer."""
    why: str = ""
    by_another: bool = False
    """It had another role than was known, before anything was asked of it."""


@dataclass(frozen=True, slots=True)
class PauseRefused:
    """A server was not paused: it does not answer, or does not take our word."""

    worker: str


@dataclass(frozen=True, slots=True)
class Wakeup:
    pass


Event = (
    Arrived
    | Left
    | PrefillDone
    | FirstToken
    | Progress
    | Finished
    | Failed
    | Freed
    | Recall
    | Preempted
    | PartDone
    | LoadReport
    | StepsSeen
    | WorkerUp
    | WorkerDown
    | WorkerDraining
    | WorkerGone
    | SwitchWanted
    | RoleSwitched
    | PauseRefused
    | Wakeup
)


class Dispatch(NamedTuple):
    """Send both legs now. A unified server takes the whole job as `decode`."""

    job: Job
    prefill: str | None
    decode: str
    attempt: int
    reason: Reason
    upto: int = 0
    """So many tokens of the prompt alone, for the cache of whoever computes them; 0: the job."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """Cancel both legs and keep what was generated: the job waits again, in its old place."""

    job: Job
    reason: Reason
    worker: str = ""
    """The server whose room was wanted."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel both legs for good."""

    job: Job
    reason: Reason


@dataclass(frozen=True, slots=True)
class Reject:
    """The job is answered without having been served."""

    job: Job
    reason: Reason
    retry_after_us: int = 0


@dataclass(frozen=True, slots=True)
class Fail:
    """The job was tried and there is no further try."""

    job: Job
    reason: Reason
    fault: Fault


@dataclass(frozen=True, slots=True)
class WakeAt:
    us: int


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """The server is empty and out of rotation: switch it, and say what it is then."""

    worker: str
    role: Role
    why: str


@dataclass(frozen=True, slots=True)
class Pause:
    """The server keeps what it has and stands still, for online work on the same GPU."""

    worker: str
    beside: str
    """The server whose online work is in danger."""


@dataclass(frozen=True, slots=True)
class Continue:
    """Nobody wants the server to stand still; it may not have done so."""

    worker: str


@dataclass(frozen=True, slots=True)
class Release:
    """The server is empty and out of rotation: it may be stopped."""

    worker: str
    why: str


@dataclass(frozen=True, slots=True)
class SwitchOver:
    """For whoever keeps accounts: there is nothing left to do."""

    worker: str
    role: Role | None
    outcome: Outcome
    drained_us: int
    """From the decision until the server was empty."""
    took_us: int = 0
    """From the decision until now."""
    why: str = ""


Decision = (
    Dispatch
    | Preempt
    | Cancel
    | Reject
    | Fail
    | WakeAt
    | SwitchRole
    | Release
    | SwitchOver
    | Pause
    | Continue
)
