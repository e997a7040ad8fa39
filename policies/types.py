"""The vocabulary of decisions: what a policy may see of jobs and workers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """Online work has a person waiting; offline work has a window."""

    ONLINE = "online"
    OFFLINE = "offline"


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class Pool(StrEnum):
    """Strict servers keep latency targets; relaxed ones give way to throughput."""

    STRICT = "strict"
    RELAXED = "relaxed"


class Resume(StrEnum):
    """What becomes of a job's answer so far when it is taken off its servers."""

    EXACT = "exact"
    """It goes on from its last token, on any server."""
    RESTART = "restart"
    """It is made again: nobody has seen any of it before its end."""
    UNTIL_SHOWN = "until_shown"
    """It is made again, but only before its first token: after that its client would notice."""


class Job(NamedTuple):
    """One prompt and one answer as policies see them; the true output length is unknown."""

    id: str
    kind: Kind
    model: str
    prompt_tokens: int
    max_tokens: int
    arrival_us: int
    deadline_us: int
    """Online: the first token is due. Offline: the last one is."""
    give_up_us: int
    """Waiting longer than this helps nobody: it is answered without being served."""
    tpot_us: int = 0
    """The time a token may take after the first; 0 when nobody waits for it."""
    cached_tokens: int = 0
    """Prompt tokens that a prefill server is believed to hold."""
    resume: Resume = Resume.EXACT
    cached_on: str = ""
    """The server that holds them; empty: any."""
    prefixes: tuple[int, ...] = ()
    """Keys of its beginnings, where the policy of placement looks at them."""
    made_tokens: int = 0
    """Of its answer, in earlier attempts: part of the prompt by now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A server as configured and as it described itself; 0 means that it did not say."""

    name: str
    url: str
    role: Role
    pool: Pool = Pool.STRICT
    model: str = ""
    host: str = ""
    """Servers that name the same host share one GPU."""
    bootstrap_host: str = ""
    bootstrap_port: int | None = None
    dp_size: int = 1
    kv_tokens: int = 0
    max_running: int = 0
    chunk_tokens: int = 0
    context_tokens: int = 0
    """Of one prompt with its answer."""
    page_size: int = 1
    orders_by_priority: bool = False
    engine: frozenset[str] = frozenset()
    """What it does by itself, by our plug-in and at our word: "decode", "prefill", "reports"; and
    "online-first" while its steps keep online targets against offline work."""
    streams_increments: bool | None = None
    """Whether its events hold what is new, or all so far; None when it did not say."""
