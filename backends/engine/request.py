"""What is asked of a server, what it remembers of that while it works, and how an answer ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from backends.engine.prompts import Prompt
from backends.engine.tokens import EOS, Script

if TYPE_CHECKING:
    from backends.engine.batch import DecodeBatch
    from backends.engine.radix import Node

FAKE_BOOTSTRAP_HOST = "2.2.2.2"
"""SGLang's mark of a request that moves no KV."""


def length_reached(tokens: int) -> dict[str, Any]:
    return {"type": "length", "length": tokens}


def stopped(matched: int | str) -> dict[str, Any]:
    return {"type": "stop", "matched": matched}


def aborted(message: str, status: int | None = None) -> dict[str, Any]:
    """Without a status it is the caller's own doing."""
    reason: dict[str, Any] = {"type": "abort", "message": message, "status_code": status}
    return reason | {"err_type": None if status is None else ERROR_TYPES.get(status)}


ERROR_TYPES = {400: "BadRequestError", 500: "InternalServerError"}


class Stopper(Protocol):
    """Finds where an answer ends by the caller's own rule, a stop string for example."""

    def __call__(self, ids: list[int], /) -> int | str | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and what to generate; a batch is several of these."""

    rid: str
    prompt: Prompt
    max_new_tokens: int | None = 128
    """None: until the context is full."""
    ignore_eos: bool = False
    true_tokens: int | None = None
    """How long the answer turns out to be, where a trace knows it; policies never see it."""
    stop_token_ids: tuple[int, ...] = ()
    stopper: Stopper | None = None
    stream: bool = False
    """Whether the listener wants to hear of every token."""
    priority: int | None = None
    is_online: bool = True
    """This and the next three are for engines that are told of classes and targets."""
    arrived_s: float | None = None
    """When it came to whoever sends it; None: when it comes to the server."""
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    """0: nobody waits for it."""
    space: str = ""
    """Prompts of different spaces share no cached prefix (extra_key, cache_salt)."""
    bootstrap_host: str = ""
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None


class Listener(Protocol):
    """Hears of one request; exactly one of `finished` and `lost` is its last word."""

    def tokens(self, resident: Resident) -> None:
        """The first token is there; with `stream`, so is each later one but the last."""
        ...

    def finished(self, resident: Resident, reason: dict[str, Any]) -> None: ...

    def lost(self, resident: Resident) -> None:
        """The server died with the request."""
        ...


class Refused(Exception):
    """The front turned the request away before it was registered."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Stage(StrEnum):
    HELD = "held"
    """Registered at the front, not yet given to the scheduler."""
    BOOTSTRAP = "bootstrap"
    WAITING = "waiting"
    PREFILL = "prefill"
    SENDING = "sending"
    HANDSHAKE = "handshake"
    PREALLOC = "prealloc"
    RECEIVING = "receiving"
    READY = "ready"
    RUNNING = "running"
    RETRACTED = "retracted"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Resident:
    """A request inside a server."""

    request: Request
    listener: Listener
    serial: int
    limit: int
    """The most tokens it may generate here."""
    budget: int
    """The same as asked for: what admission goes by, whatever the answer turns out to be."""
    script: Script
    arrived_s: float
    stage: Stage = Stage.HELD
    abort_sent: bool = False
    batch: DecodeBatch | None = None
    joined: int = 0
    generated_before: int = 0
    end_reason: dict[str, Any] | None = None
    """Set when the answer's end is decided: by its limit, by itself, or by an abort."""
    prefilled: int = 0
    """Tokens whose KV exists, while the request is not in the running batch."""
    node: Node | None = None
    shared: int = 0
    """Tokens whose KV the prefix cache holds for this request."""
    held: int = 0
    """Tokens of private pages, while the request is not in the running batch."""
    cached_tokens: int = 0
    retractions: int = 0
    failure: str | None = None
    """Why the pair is known to have failed, before this side noticed."""
    peer: Peer | None = None
    skipped: int = 0
    """Decode steps in a row that it was left out of."""
    entered_tokens: int = 0
    """What the server had computed of prompts when this one began to wait."""
    began_s: float | None = None
    """When the first of its prompt was taken into a forward pass."""
    computed_s: float | None = None
    """When all of its prompt had been computed."""
    computed_tokens: int = 0
    """Prompt tokens computed for it, those computed again after a retraction included."""
    first_token_s: float | None = None
    settled: bool = False
    natural_end: dict[str, Any] = field(default_factory=dict)

    @property
    def generated(self) -> int:
        """Tokens generated so far; while running it follows from the batch's step count."""
        if self.batch is None:
            return self.generated_before
        return self.generated_before + self.batch.steps - self.joined

    @property
    def output_ids(self) -> list[int]:
        return self.script.first(self.generated)

    @property
    def fill_tokens(self) -> int:
        """What a prefill would have to compute now."""
        return self.request.prompt.tokens + self.generated

    def full_prompt(self) -> Prompt:
        """The prompt with everything generated behind it."""
        generated = self.generated
        if not generated:
            return self.request.prompt
        names_only = not hasattr(self.request.prompt, "packed")
        return self.request.prompt.grown(generated if names_only else self.output_ids)

    def settle_end(self) -> None:
        """Decide, at the first token, after how many tokens the answer ends."""
        if self.settled:
            return
        self.settled = True
        request = self.request
        self.natural_end = length_reached(self.limit)
        if request.true_tokens is not None:
            if request.true_tokens < self.limit:
                self.limit, self.natural_end = max(1, request.true_tokens), stopped(EOS)
        elif not request.ignore_eos or request.stop_token_ids or request.stopper:
            self._find_end()

    def _find_end(self) -> None:
        for count in range(1, self.limit + 1):
            matched = self._matched(count)
            if matched is not None:
                self.limit, self.natural_end = count, stopped(matched)
                return

    def _matched(self, count: int) -> int | str | None:
        ids = self.script.first(count) if self.request.stopper else []
        last = self.script.at(count - 1)
        if last in self.request.stop_token_ids or (last == EOS and not self.request.ignore_eos):
            return last
        return self.request.stopper(ids) if self.request.stopper else None


@dataclass(frozen=True, slots=True)
class Peer:
    """The other leg: a server's name, which life of it, and the request there."""

    server: str
    life: int
    resident: Resident | None = None
