"""One try at a row: its answer, or why it is to be tried again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gateway.clients import UnaryClient
from gateway.dialects import ROUTES
from gateway.errors import ApiError, Code, Dialect, error_body
from gateway.front import Front
from gateway.passing import Passing
from gateway.visit import Errand, Visit
from policies.events import Fault

_STATUS_TOO_EARLY = (408, 429)
_STATUS_BUSY = (429, 503)
_ENGINE_SAID = frozenset({Fault.ENGINE})


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
        answer = await self._passing.answer_of_unified(path, errand.body)
        if _is_passing(answer.status):
            message = answer.body.decode(errors="replace")
            if answer.status in _STATUS_BUSY:
                return Later(code=Code.UPSTREAM_OVERLOADED, message=message)
            return Later(code=Code.UPSTREAM_FAILED, message=message, is_engines=True)
        return Answered(status=answer.status, body=answer.body)


def _told(visit: Visit, client: UnaryClient) -> Outcome:
    if client.error is not None:
        is_engines = client.fault in _ENGINE_SAID
        return _judged(visit.ask.dialect, client.error, visit.request_id, is_engines=is_engines)
    return Answered(
        status=client.status,
        body=client.body,
        tokens=sum(part.exchange.tokens for part in visit.parts),
        prompt_tokens=visit.ask.prompt_tokens,
    )


def _judged(
    dialect: Dialect, error: ApiError, request_id: str, *, is_engines: bool = False
) -> Outcome:
    """A 4xx is the row's own answer. All else is the fleet's trouble, and ours to try again."""
    if _is_passing(error.status) or error.code is Code.REQUEST_CANCELLED:
        return Later(code=error.code, message=error.message, is_engines=is_engines)
    return Answered(status=error.status, body=error_body(dialect, error, request_id=request_id))


def _is_passing(status: int) -> bool:
    return status >= 500 or status in _STATUS_TOO_EARLY


def dialect_of(path: str) -> Dialect:
    return ROUTES[path]
