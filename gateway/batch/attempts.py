"""One try at a row: its answer, or why it is to be tried again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from backends.http import HttpError, Reason
from gateway.batch.absences import ABSENT
from gateway.clients import UnaryClient
from gateway.dialects import ROUTES
from gateway.errors import ApiError, Code, Dialect, error_body
from gateway.front import Front
from gateway.passing import NOT_SENT, Bounds, Passing, failed
from gateway.visit import Errand, Visit
from policies.events import Fault

_STATUS_TOO_EARLY = (408, 429)
_STATUS_BUSY = (429, 503)
_STATUS_LOCKED = (401, 403)
"""A server does not take the gateway's key: that is not the row's doing."""
_BROKE = frozenset({Fault.DIED, Fault.TIMEOUT, Fault.PAIRING})
_ROW_TIMEOUT_S = 600.0
"""As long as an offline request may be without its first token, unless said otherwise."""
_ROW_BYTES = 64 << 20
"""An answer may be longer than what a page holds: that of 2,048 inputs in 1,024 dimensions has 40
MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What an HTTP client would have got, and nobody will ask again."""

    status: int
    body: bytes
    tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Later:
    """No fault of the row: nobody could answer it now."""

    code: Code
    message: str
    is_engines: bool = False
    """A server that lives has said so, of this row: it may say so for ever."""
    is_death: bool = False
    """A server that had the row died or hung, or broke off: the row may be what it died of."""
    param: str | None = None
    """Of the request: what is wrong, if this is to be its answer."""


Outcome = Answered | Later
Watch = Callable[[Visit], AbstractContextManager[object]]


class Attempts:
    """Asks the gateway itself, past its sockets."""

    def __init__(self, front: Front, passing: Passing) -> None:
        self._front = front
        self._passing = passing

    async def answer(self, path: str, errand: Errand, watch: Watch) -> Outcome:
        """`watch` holds the visit while it is under way, and is not asked about others."""
        try:
            if errand.dialect is Dialect.EMBEDDINGS:
                return await self._passed(path, errand)
            visit = self._front.enter(errand)
        except ApiError as error:
            return _judged(errand.dialect, error, errand.request_id)
        with watch(visit):
            client = await self._front.answer_to(visit)
        return _told(visit, client)

    async def _passed(self, path: str, errand: Errand) -> Outcome:
        bounds = Bounds(timeout_s=_ROW_TIMEOUT_S, max_bytes=_ROW_BYTES)
        try:
            answer = await self._passing.answer_of_unified(path, errand.body, bounds)
        except HttpError as trouble:
            return _broken_off(trouble)
        if not (_is_passing(answer.status) or answer.status in _STATUS_LOCKED):
            return Answered(status=answer.status, body=answer.body)
        message = answer.body.decode(errors="replace")
        if answer.status in _STATUS_BUSY:
            return Later(code=Code.UPSTREAM_OVERLOADED, message=message)
        return Later(code=Code.UPSTREAM_FAILED, message=message, is_engines=True)


def _broken_off(trouble: HttpError) -> Later:
    """An answer that is too long will be too long again."""
    error = failed(trouble)
    is_long = trouble.reason is Reason.TOO_LARGE
    is_death = not is_long and trouble.reason not in NOT_SENT
    return Later(code=error.code, message=error.message, is_engines=is_long, is_death=is_death)


def _told(visit: Visit, client: UnaryClient) -> Outcome:
    if client.error is not None:
        return _judged(visit.ask.dialect, client.error, visit.request_id, client.fault)
    return Answered(
        status=client.status,
        body=client.body,
        tokens=sum(part.exchange.tokens for part in visit.parts),
        prompt_tokens=visit.ask.prompt_tokens,
    )


def _judged(
    dialect: Dialect, error: ApiError, request_id: str, fault: Fault | None = None
) -> Outcome:
    """A 4xx is the row's own answer, unless it is said of what is on the list just now. All else is
    the fleet's trouble, and ours to try again."""
    is_ours = error.code is Code.REQUEST_CANCELLED or error.code in ABSENT
    if is_ours or _is_passing(error.status):
        return Later(
            code=error.code,
            message=error.message,
            is_engines=fault is Fault.ENGINE,
            is_death=fault in _BROKE,
            param=error.param,
        )
    return Answered(status=error.status, body=error_body(dialect, error, request_id=request_id))


def _is_passing(status: int) -> bool:
    return status >= 500 or status in _STATUS_TOO_EARLY


def dialect_of(path: str) -> Dialect:
    return ROUTES[path]
