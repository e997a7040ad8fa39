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
from backends.whole import Ids, Whole, ids_told
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

    def told(status: int, body: bytes) -> None:
        found = ids_told(body)
        if found is None:
            _no_ids(attempt, tokenizer.name, status, body)
            return
        exchange.prompt_ids = found
        _go_on(attempt, exchange, found, send)

    def failed(error: HttpError) -> None:
        attempt.fail(Fault.UNREACHABLE, (tokenizer.name,), judge(502, str(error)))

    asked = orjson.dumps(exchange.asks or _text_in(exchange.body))
    call = tokenizer.upstream.send(b"POST", b"/v1/tokenize", asked, Whole(told, failed))
    attempt.waits_for(tokenizer, call)


def _no_ids(attempt: Attempt, server: str, status: int, body: bytes) -> None:
    trouble = judge_answer("chat", status, body)
    if trouble is None or trouble.retryable:
        trouble = judge(502, f"/v1/tokenize answered {status} and no ids")
    is_request = trouble.blames is Blame.REQUEST
    fault, blamed = (Fault.REQUEST, ()) if is_request else (Fault.ENGINE, (server,))
    attempt.fail(fault, blamed, trouble)


def _go_on(attempt: Attempt, exchange: Exchange, ids: Ids, send: Send) -> None:
    assert exchange.transcript is not None
    if not exchange.has_begun:
        send(attempt, exchange.body | {"input_ids": ids}, None)
        return
    earlier = exchange.transcript.state().settled()
    send(attempt, resumed_body(exchange.body, ids, earlier), Splicer(exchange.body, earlier))


def _ids_in(body: dict[str, Any]) -> Ids | None:
    for name in ("input_ids", "prompt"):
        if isinstance(value := body.get(name), list):
            return value
    return None


def _text_in(body: dict[str, Any]) -> dict[str, Any]:
    text = str(body.get("text") or body.get("prompt") or "")
    return {"model": body.get("model") or "", "prompt": text}
