"""One job on the data path: what to send, whom to answer, and when what happened."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from backends.transcript import Transcript
from backends.trouble import Trouble
from policies.events import Fail, Reject
from policies.types import Job


class Client(Protocol):
    """Whoever waits for the answer. Exactly one of answer, end and refused is called."""

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        """The whole answer of a request that was not streamed."""

    def begin(self) -> None:
        """A stream has its first piece: from here on its status can not change."""

    def write(self, piece: bytes) -> bool:
        """Whole SSE events. True asks to pause: the client does not read as fast."""

    def has_room(self) -> bool: ...

    def drop(self) -> None:
        """It does not read: its connection is closed."""

    def end(self) -> None: ...

    def refused(self, decision: Reject | Fail, trouble: Trouble | None) -> None:
        """There is no answer, or no more of it."""


@dataclass(slots=True, kw_only=True)
class Timeline:
    """When what happened, in microseconds of the gateway's clock; 0 is never."""

    arrived_us: int = 0
    dispatched_us: int = 0
    prefilled_us: int = 0
    first_token_us: int = 0
    ended_us: int = 0


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Lives as long as its job, over all attempts."""

    job_id: str
    path: bytes
    dialect: str
    body: dict[str, Any]
    stream: bool
    """What the servers are asked for."""
    client: Client
    request_id: str = ""
    """Of the client's request, by which the log's lines about it are found together."""
    client_rid: str = ""
    """The id that the client chose: servers never see it, answers carry it."""
    priority: int | None = None
    job: Job | None = None
    """As it was dispatched last: an engine may want to know its class and target."""
    transcript: Transcript | None = None
    """What the client was given, for requests that can go on elsewhere."""
    prompt_ids: list[int] | None = None
    """The prompt as tokens, once they were needed."""
    asks: dict[str, Any] | None = None
    """What /v1/tokenize is asked before anything can be sent; None: `body` has its prompt."""
    assembles: bool = False
    """The client wants one answer, the servers are asked for a stream: it can be resumed."""
    first_token_timeout_s: float = 0.0
    whole_timeout_s: float = math.inf
    """For an answer that is not streamed: it shows nothing until its end."""
    is_part: bool = False
    """Of a prompt: its token is for nobody."""
    aborted: bool = False
    """The client asked for the end; what servers say of it is the answer."""

    timeline: Timeline = field(default_factory=Timeline)
    prefill: str = ""
    decode: str = ""
    attempts: int = 0
    preemptions: int = 0
    tokens: int = 0
    trouble: Trouble | None = None
    shown_rid: str = ""
    """The rid of the attempt that the client has heard first: the id in all that follows."""

    @property
    def has_begun(self) -> bool:
        """There is something to go on from: shown already, or made before this process was."""
        return self.timeline.first_token_us > 0 or (self.transcript is not None and self.tokens > 0)

    @property
    def is_restartable(self) -> bool:
        """A new attempt can take over without the client noticing."""
        return self.transcript is not None or not self.timeline.first_token_us

    @property
    def kept_tokens(self) -> int:
        """Tokens from which a new attempt goes on."""
        return 0 if self.transcript is None else self.transcript.state().settled_tokens

    @property
    def began_us(self) -> int:
        """When the first token was there; of an answer that is not streamed, when the prefill
        server had made it. 0 where nobody can tell: a unified server shows its whole answer only.
        """
        times = self.timeline
        return times.first_token_us or (0 if self.stream else times.prefilled_us)

    @property
    def tpot_us(self) -> float | None:
        """The mean time of a token after the first; none for an answer of one token."""
        began_us, ended_us = self.began_us, self.timeline.ended_us
        if not began_us or not ended_us or self.tokens < 2:
            return None
        return (ended_us - began_us) / (self.tokens - 1)
