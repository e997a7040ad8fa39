"""Servers that stand still at the gateway's word: asked until they answer, and none is left so."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import structlog

from backends.http import Call, HttpError, Upstream
from policies.clock import Clock, Timer

log = structlog.get_logger("slackwater.standstill")

ANSWER_S = 2.0
PAUSE_TRIES = 3
"""Then it is not paused, and its work goes elsewhere."""
LAST_TRIES = 3
"""To have one go on that is no longer on the list."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.25, 5.0
_PAUSE = b"/pause_generation", orjson.dumps({"mode": "in_place"})
_CONTINUE = b"/continue_generation", orjson.dumps({"torch_empty_cache": False})
"""Emptying the allocator's cache is for weights that have changed, and takes time."""


class _Server:
    """What it is to do, and what it was last heard to do; one question at a time."""

    def __init__(
        self, name: str, upstream: Upstream, clock: Clock, refused: Callable[[str], None]
    ) -> None:
        self.name = name
        self.upstream = upstream
        self.stands: bool | None = None
        """As far as it has said; None: nobody knows."""
        self.wanted = False
        self.is_last = False
        """It is no longer on the list."""
        self._clock = clock
        self._refused = refused
        self._asked: bool | None = None
        self._tries = 0
        self._status = 0
        self._call: Call | None = None
        self._timer: Timer | None = None

    @property
    def is_settled(self) -> bool:
        return self._asked is None and self.stands is self.wanted

    def want(self, *, stands: bool) -> None:
        if stands is not self.wanted:
            self._tries = 0
        self.wanted = stands
        self._ask()

    def _ask(self) -> None:
        if self._asked is not None or self.stands is self.wanted:
            return
        self._asked, self._status = self.wanted, 0
        self._wait(ANSWER_S, self._too_late)
        path, body = _PAUSE if self.wanted else _CONTINUE
        self._call = self.upstream.send(b"POST", path, body, self)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self.rest()
        self._timer = self._clock.call_at(self._clock.time() + seconds, then)

    def rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # What comes of it.

    def on_head(self, status: int) -> None:
        self._status = status

    def on_body(self, piece: bytes) -> None: ...

    def on_end(self) -> None:
        self._over("" if self._status == 200 else f"answered {self._status}")

    def on_error(self, error: HttpError) -> None:
        self._over(str(error))

    def _too_late(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self._over(f"no answer in {ANSWER_S:g} s")

    def _over(self, error: str) -> None:
        self.rest()
        asked, self._asked, self._call = self._asked, None, None
        if not error:
            self.stands, self._tries = asked, 0
            self._ask()
            return
        self.stands = None
        self._tries += 1
        if asked is not self.wanted:
            self._ask()
        elif asked:
            self._not_paused(error)
        else:
            self._not_going_on(error)

    @property
    def _is_refusal(self) -> bool:
        """Of a server that will say the same again."""
        return 400 <= self._status < 500

    def _not_paused(self, error: str) -> None:
        if not self._is_refusal and self._tries < PAUSE_TRIES:
            self._again()
            return
        log.warning("a server was not paused", worker=self.name, error=error, tries=self._tries)
        self.want(stands=False)  # the answer may have been lost on its way
        self._refused(self.name)

    def _not_going_on(self, error: str) -> None:
        ends = self._is_refusal or (self.is_last and self._tries >= LAST_TRIES)
        if self._tries == 1 or ends:
            again = not ends
            log.warning("a server was not continued", worker=self.name, error=error, again=again)
        if ends:
            self.stands = False
        else:
            self._again()

    def _again(self) -> None:
        self._wait(min(LONGEST_RETRY_S, FIRST_RETRY_S * 2 ** min(self._tries, 8)), self._ask)


class Standstill:
    """Asks servers to stand still and to go on; the last word counts."""

    def __init__(self, clock: Clock, refused: Callable[[str], None]) -> None:
        self._clock = clock
        self._told = refused
        self._servers: dict[str, _Server] = {}
        self._leaving: list[_Server] = []
        self._is_closed = False
        self.names: set[str] = set()
        """Servers whose requests wait because they are to stand still."""

    def pause(self, name: str, upstream: Upstream, beside: str) -> None:
        if self._is_closed:
            return
        log.info("paused", worker=name, beside=beside)
        self.names.add(name)
        self._server(name, upstream).want(stands=True)

    def go_on(self, name: str, upstream: Upstream) -> None:
        if name in self.names:
            log.info("continued", worker=name)
        self.names.discard(name)
        self._server(name, upstream).want(stands=False)

    def forget(self, name: str) -> None:
        """It is taken off the list, and goes on."""
        self.names.discard(name)
        if (server := self._servers.pop(name, None)) is not None:
            self._leaving = [it for it in self._leaving if not it.is_settled]
            server.is_last = True
            self._leaving.append(server)
            server.want(stands=False)

    def let_all_go(self) -> None:
        """The gateway ends: from now on nobody is paused."""
        self._is_closed = True
        self.names.clear()
        for server in self._servers.values():
            server.want(stands=False)

    @property
    def is_settled(self) -> bool:
        return all(it.is_settled for it in [*self._servers.values(), *self._leaving])

    def close(self) -> None:
        for server in [*self._servers.values(), *self._leaving]:
            server.rest()

    def _server(self, name: str, upstream: Upstream) -> _Server:
        server = self._servers.get(name)
        if server is None:
            server = self._servers[name] = _Server(name, upstream, self._clock, self._refused)
        server.upstream = upstream
        return server

    def _refused(self, name: str) -> None:
        self.names.discard(name)
        self._told(name)
