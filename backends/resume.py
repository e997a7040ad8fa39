"""How an attempt is sent as token ids: those of its prompt, and of the answer so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from backends.exchange import Exchange
from backends.http import HttpError
from backends.splice import Splicer
from backends.transcript import resumed_body
from backends.trouble import Blame, judge, judge_answer
from policies.events import Fault

if TYPE_CHECKING:
    from backends.attempt import Attempt
    from backends.sglang import Server

Send = Callable[["Attempt", dict[str, Any], Splicer | None], None]


def resume(attempt: Attempt, exchange: Exchange, tokenizer: Server, send: Send) -> None:
    """Sends the attempt now, or once a server has told the prompt's ids."""
    ids = exchange.prompt_ids or _ids_in(exchange.body)
    if ids is not None:
        _go_on(attempt, exchange, ids, send)
        return

    def go_on_with(found: list[int]) -> None:
        exchange.prompt_ids = found
        _go_on(attempt, exchange, found, send)

    asked = orjson.dumps(exchange.asks or _text_in(exchange.body))
    listener = _Tokenized(attempt, tokenizer.name, go_on_with)
    call = tokenizer.upstream.send(b"POST", b"/v1/tokenize", asked, listener)
    attempt.waits_for(tokenizer, call)


def _go_on(attempt: Attempt, exchange: Exchange, ids: list[int], send: Send) -> None:
    assert exchange.transcript is not None
    if not exchange.has_begun:
        send(attempt, exchange.body | {"input_ids": ids}, None)
        return
    earlier = exchange.transcript.state().settled()
    send(attempt, resumed_body(exchange.body, ids, earlier), Splicer(exchange.body, earlier))


def _ids_in(body: dict[str, Any]) -> list[int] | None:
    for name in ("input_ids", "prompt"):
        if isinstance(value := body.get(name), list):
            return value
    return None


def _text_in(body: dict[str, Any]) -> dict[str, Any]:
    text = str(body.get("text") or body.get("prompt") or "")
    return {"model": body.get("model") or "", "prompt": text}


class _Tokenized:
    """Waits for a prompt's token ids."""

    def __init__(self, attempt: Attempt, server: str, found: Callable[[list[int]], None]) -> None:
        self._attempt = attempt
        self._server = server
        self._found = found
        self._pieces: list[bytes] = []
        self._status = 0

    def on_head(self, status: int) -> None:
        self._status = status

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_end(self) -> None:
        body = b"".join(self._pieces)
        try:
            tokens = orjson.loads(body)["tokens"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            tokens = None
        if isinstance(tokens, list):
            self._found(tokens)
            return
        trouble = judge_answer("chat", self._status, body)
        if trouble is None or trouble.retryable:
            trouble = judge(502, f"/v1/tokenize answered {self._status} and no ids")
        fault = Fault.REQUEST if trouble.blames is Blame.REQUEST else Fault.ENGINE
        self._attempt.fail(fault, (self._server,) if fault is Fault.ENGINE else (), trouble)

    def on_error(self, error: HttpError) -> None:
        self._attempt.fail(Fault.UNREACHABLE, (self._server,), judge(502, str(error)))
