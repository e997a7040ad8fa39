"""What the driver asks of whoever answers requests, live or simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from policies.events import (
    Continue,
    Dispatch,
    Event,
    Fail,
    Pause,
    Preempt,
    Reject,
    Release,
    SwitchRole,
)
from policies.types import Job, Role, Worker

Post = Callable[[Event], None]


class Backend(Protocol):
    """Turns decisions into work and posts what comes of it as events.

    After `start`, exactly one of Finished, Failed, Preempted (once it was preempted) and Freed
    (once it was stopped) is posted. One that is preempted and then stopped may be told of as both.
    """

    def connect(self, post: Post) -> None: ...

    def start(self, dispatch: Dispatch) -> None: ...

    def preempt(self, decision: Preempt) -> None:
        """Takes it off its servers; the next `start` goes on from what it has generated.

        One whose answer is complete just now finishes, and one that its client would miss runs on.
        """
        ...

    def pause(self, decision: Pause) -> None:
        """The server stands still with all that it has. Where it does not, PauseRefused is posted;
        how long its jobs stand still is no fault of theirs."""
        ...

    def go_on(self, decision: Continue) -> None:
        """Asked of one that does not stand still, nothing happens."""
        ...

    def stop(self, job: Job) -> None: ...

    def refuse(self, decision: Reject | Fail) -> None: ...


class Actuator(Protocol):
    """Changes what servers are; the server is empty, as far as the gateway knows.

    After `move` with a role, one RoleSwitched is posted, with the role that the server was found
    to have. A server that is given back is posted as WorkerGone.
    """

    def connect(self, post: Post) -> None: ...

    def move(self, decision: SwitchRole | Release) -> None: ...


class Roll(Protocol):
    """The list of servers, for those who start and end them while the gateway runs."""

    def come(self, worker: Worker, api_key: str = "") -> None:
        """It is asked who it is, and serves once it has answered; said twice it is one server."""
        ...

    def leave(self, name: str) -> None: ...


class Size(Protocol):
    """Starts servers, where something can."""

    @property
    def starting(self) -> dict[Role, int]:
        """Servers that are on their way."""
        ...

    def launch(self, role: Role) -> bool:
        """Whether there is room for one; it comes when it serves."""
        ...
