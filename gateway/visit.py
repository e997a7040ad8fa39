"""One HTTP request while it is served, and how its parts become one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backends.checkpoint import Checkpoint, go_on_from, taken_of
from backends.exchange import Exchange
from backends.trouble import Trouble
from gateway.clients import StreamClient, UnaryClient
from gateway.dialects import Ask
from gateway.errors import ApiError, Code, Dialect
from gateway.fanout import StreamMerger, merge_answers
from policies.events import Fail, Reject
from policies.retry import continued
from policies.types import Job, Kind


@dataclass(slots=True)
class Part:
    """A prompt and a sample: what one pair of servers does."""

    job: Job
    exchange: Exchange

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Before it is begun: what was made already is part of its prompt."""
        go_on_from(self.exchange, checkpoint)
        self.job = continued(self.job, checkpoint.tokens, self.job.arrival_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A request that comes from inside the gateway: offline work with its own deadline."""

    request_id: str
    tenant: str
    dialect: Dialect
    body: bytes
    due_us: int
    """Of the gateway's clock; after this nobody wants the answer."""
    earlier: Checkpoint | None = None
    """How far another attempt at the same body has come."""


@dataclass(slots=True)
class Visit:
    request_id: str
    tenant: str
    kind: Kind
    ask: Ask
    rid: str
    """The client's own id for it."""
    client: StreamClient | UnaryClient
    parts: list[Part]

    @property
    def is_resumable(self) -> bool:
        """The one answer that it wants can go on from its tokens."""
        return len(self.parts) == 1 and self.parts[0].exchange.transcript is not None

    def checkpoint(self) -> Checkpoint | None:
        """How far it has come, where another attempt could go on from there."""
        return taken_of(self.parts[0].exchange) if self.is_resumable else None


class FanOut:
    """Collects the answers to all parts. The first that fails ends the whole."""

    def __init__(
        self, ask: Ask, client: StreamClient | UnaryClient, parts: int, give_up: Callable[[], None]
    ) -> None:
        self._ask = ask
        self._give_up = give_up
        self._bodies: list[bytes] = [b""] * parts
        self._left = parts
        self._merger = StreamMerger(ask) if ask.stream else None
        self._over = False
        self.client = client

    def part(self, index: int) -> PartClient:
        return PartClient(self, index)

    def answer(self, index: int, status: int, body: bytes) -> None:
        self._bodies[index] = body
        self._left -= 1
        if not self._left and not self._over:
            self._over = True
            try:
                merged = merge_answers(self._ask, self._bodies)
            except (ApiError, AttributeError, KeyError, TypeError):
                self.client.ended(ApiError(Code.UPSTREAM_FAILED, "the answers do not fit together"))
            else:
                self.client.answer(status, "application/json", merged)

    def write(self, index: int, piece: bytes) -> bool:
        if self._over or self._merger is None:
            return False
        merged = self._merger.feed(index, piece)
        return self.client.write(merged) if merged else not self.client.has_room()

    def end(self, index: int) -> None:
        if self._over or self._merger is None:
            return
        self._left -= 1
        if last := self._merger.finish(index):
            self.client.write(last)
        if not self._left:
            self._over = True
            self.client.end()

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        if not self._over:
            self._over = True
            self.client.refused(decision, trouble)
            self._give_up()


class PartClient:
    """What the data path sees of a part's client."""

    __slots__ = ("_index", "_whole")

    def __init__(self, whole: FanOut, index: int) -> None:
        self._whole = whole
        self._index = index

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        self._whole.answer(self._index, status, body)

    def begin(self) -> None:
        self._whole.client.begin()

    def write(self, piece: bytes) -> bool:
        return self._whole.write(self._index, piece)

    def has_room(self) -> bool:
        return self._whole.client.has_room()

    def drop(self) -> None:
        self._whole.client.drop()

    def end(self) -> None:
        self._whole.end(self._index)

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        self._whole.refused(decision, trouble)
