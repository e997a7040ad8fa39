"""How a small question is put to servers one after the other, until one of them answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import orjson

from backends.http import Call, HttpError, Upstream
from backends.whole import Whole
from policies.clock import Clock, Timer

PATIENCE_S = 10.0
"""A server that has not answered by then is taken for one that will not."""

Then = Callable[[dict[str, Any] | None], None]
"""Told what a server said; None: none of them said anything."""


class Consultation:
    """Any of the servers would say the same."""

    def __init__(
        self, upstreams: Iterable[Upstream], path: bytes, body: bytes, clock: Clock, then: Then
    ) -> None:
        self._upstreams = iter(upstreams)
        self._path = path
        self._body = body
        self._clock = clock
        self._then = then
        self._call: Call | None = None
        self._timer: Timer | None = None
        self._ask()

    def _ask(self) -> None:
        upstream = next(self._upstreams, None)
        if upstream is None:
            self._then(None)
            return
        self._timer = self._clock.call_at(self._clock.time() + PATIENCE_S, self._too_late)
        listener = Whole(self._told, self._failed)
        self._call = upstream.send(b"POST", self._path, self._body, listener)

    def _too_late(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self._ask()

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _told(self, status: int, body: bytes) -> None:
        self._rest()
        answer = _object_in(body) if status == 200 else None
        if answer is None:
            self._ask()
        else:
            self._then(answer)

    def _failed(self, error: HttpError) -> None:
        self._rest()
        self._ask()


def _object_in(body: bytes) -> dict[str, Any] | None:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
