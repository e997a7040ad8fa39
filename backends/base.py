"""What the driver asks of whoever answers requests, live or simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from policies.events import Dispatch, Event, Fail, Reject
from policies.types import Job

Post = Callable[[Event], None]


class Backend(Protocol):
    """Turns decisions into work and posts what comes of it as events.

    After `start`, exactly one of Finished, Failed or, once it was stopped, Freed is posted.
    """

    def connect(self, post: Post) -> None: ...

    def start(self, dispatch: Dispatch) -> None: ...

    def stop(self, job: Job) -> None: ...

    def refuse(self, decision: Reject | Fail) -> None: ...
