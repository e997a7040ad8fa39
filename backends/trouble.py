"""What a server's answer says went wrong, whose fault it is, and whether another may try."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import orjson

from backends.sse import ends_stream, payloads
from policies.events import Fault

MESSAGE_CHARS: Final = 2_000


class Blame(StrEnum):
    """What a retry must change; a request's own fault and our aborts count against no server."""

    REQUEST = "request"
    PREFILL = "prefill"
    DECODE = "decode"
    PAIR = "pair"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    status: int
    message: str
    retryable: bool
    """On another worker or pair, with a new rid and room."""
    blames: Blame


_KNOWN: Final[tuple[tuple[str, Blame, bool], ...]] = (
    ("Duplicate request ID detected", Blame.REQUEST, True),
    ("follow_bootstrap_room conflict", Blame.REQUEST, False),
    ("Using priority is disabled", Blame.REQUEST, False),
    ("aborted by a higher priority request", Blame.ABORTED, True),
    ("Abort in waiting queue", Blame.ABORTED, False),
    ("Lost connection with prefill instance", Blame.PREFILL, True),
    ("Decode handshake failed", Blame.PREFILL, True),
    ("Prefill bootstrap failed", Blame.PAIR, True),
    ("Prefill transfer failed", Blame.PAIR, True),
    ("Decode transfer failed", Blame.PAIR, True),
    ("Metadata corruption detected", Blame.PAIR, True),
    ("bootstrap_room=0", Blame.PAIR, True),
    ("KV checksum mismatch", Blame.PAIR, True),
    ("Retracted under decode memory pressure", Blame.DECODE, True),
    ("Out of memory even after retracting", Blame.DECODE, True),
    ("Retraction host KV pool exhausted", Blame.DECODE, True),
)
"""Messages are matched before statuses: one status stands for many causes. The first match wins,
so a lost prefill is named before the transfer that it broke."""


def judge(status: int, message: str, *, leg: Blame = Blame.DECODE) -> Trouble:
    """`leg` answered, and is to blame for what no rule explains."""
    message = message[:MESSAGE_CHARS]
    for words, blames, retryable in _KNOWN:
        if words in message:
            return Trouble(status=status, message=message, retryable=retryable, blames=blames)
    if status in (401, 403):
        return Trouble(status=status, message=message, retryable=False, blames=leg)
    if 400 <= status < 500 and status not in (408, 429):
        return Trouble(status=status, message=message, retryable=False, blames=Blame.REQUEST)
    return Trouble(status=status, message=message, retryable=True, blames=leg)


def judge_event(piece: bytes, *, leg: Blame = Blame.DECODE) -> Trouble | None:
    """Trouble in whole events. Quotes inside text are escaped, so that it cannot look like a key;
    a text that is nothing but one of these words costs a parse and is then found innocent."""
    if b'"error"' not in piece and b'"abort"' not in piece:
        return None
    for event in payloads(piece):
        if (trouble := _judge_object(event, leg)) is not None:
            return trouble
    return None


def judge_answer(
    dialect: str, status: int, body: bytes, *, leg: Blame = Blame.DECODE
) -> Trouble | None:
    """An answer that has come as a whole; a streamed one must have reached its end."""
    if status >= 400:
        return judge(status, _refusal(body), leg=leg)
    if body.startswith((b"data: ", b"event: ", b":")):
        return judge_event(body, leg=leg) or _judge_end(body, leg)
    if body.rstrip()[-1:] not in (b"}", b"]"):
        return judge(502, "the answer is cut short", leg=leg)
    if body.find(b'"error"') < 0 and body.find(b'"abort"') < 0:  # `in` takes twice as long
        return None
    return _judge_values(dialect, body, leg)


def _judge_end(body: bytes, leg: Blame) -> Trouble | None:
    if ends_stream(body) or any(_finish_of(event) is not None for event in payloads(body)):
        return None
    return judge(502, "the stream ended before its last event", leg=leg)


def _judge_values(dialect: str, body: bytes, leg: Blame) -> Trouble | None:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return judge(502, "the answer is not valid JSON", leg=leg)
    values = value if type(value) is list and dialect == "generate" else [value]
    found = (_judge_object(one, leg) for one in values if type(one) is dict)
    return next((trouble for trouble in found if trouble is not None), None)


def _judge_object(value: dict[str, Any], leg: Blame) -> Trouble | None:
    """One event or answer of any protocol."""
    failed = value.get("response") if value.get("type") == "response.failed" else value
    if type(failed) is dict and (error := failed.get("error")):
        return _judge_error(error, leg)
    finish = _finish_of(value)
    if finish == "abort":
        return Trouble(status=499, message="Aborted", retryable=False, blames=Blame.ABORTED)
    if type(finish) is dict and finish.get("type") == "abort":
        return _judge_abort(finish, leg)
    return None


def _judge_error(error: Any, leg: Blame) -> Trouble:
    if type(error) is not dict:
        return judge(500, _words(error), leg=leg)
    code = error.get("status", error.get("code"))
    if type(code) is not int or not 400 <= code <= 599:
        code = _TYPES.get(_words(error.get("type")), 500)
    return judge(code, _words(error.get("message")), leg=leg)


def _words(value: Any) -> str:
    return value if type(value) is str else "the server gave no reason"


_TYPES: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "overloaded_error": 503,
}
"""Where a protocol has no number for an error, its type stands for one."""


def _judge_abort(finish: dict[str, Any], leg: Blame) -> Trouble:
    """An abort with a status is a failure; without one, somebody asked for it."""
    message, code = _words(finish.get("message")), finish.get("status_code")
    if type(code) is int and 400 <= code <= 599:
        return judge(code, message, leg=leg)
    return Trouble(
        status=499, message=message[:MESSAGE_CHARS], retryable=False, blames=Blame.ABORTED
    )


def _finish_of(value: dict[str, Any]) -> Any:
    """The finish reason: an object in SGLang's own protocol, a word in OpenAI's."""
    if type(meta := value.get("meta_info")) is dict:
        return meta.get("finish_reason")
    choices = value.get("choices")
    if type(choices) is not list:
        return value.get("stop_reason")
    reasons = [one.get("finish_reason") for one in choices if type(one) is dict]
    return "abort" if "abort" in reasons else next((one for one in reasons if one), None)


def _refusal(body: bytes) -> str:
    """The message of an error body in any of the shapes servers and proxies use."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:MESSAGE_CHARS].decode(errors="replace")
    for key in ("error", "detail", "message"):
        if type(value) is dict and value.get(key):
            value = value[key]
    return value if type(value) is str else body[:MESSAGE_CHARS].decode(errors="replace")


_OVERLOADED: Final = frozenset({429, 503})
_OUR_KEY: Final = frozenset({401, 403})
"""What a server says of the gateway's key, which no client has chosen."""


def fault_of(trouble: Trouble) -> Fault:
    if trouble.blames is Blame.ABORTED or trouble.status in _OUR_KEY:
        return Fault.ENGINE
    if not trouble.retryable:
        return Fault.REQUEST
    if trouble.status in _OVERLOADED:
        return Fault.BUSY
    return Fault.PAIRING if trouble.blames is Blame.PAIR else Fault.ENGINE


def blamed_by(trouble: Trouble, prefill: str, decode: str) -> tuple[str, ...]:
    """Which of the two servers; they may be one."""
    match trouble.blames:
        case Blame.PREFILL:
            return (prefill,)
        case Blame.DECODE:
            return (decode,)
        case Blame.PAIR:
            return (prefill, decode)
        case Blame.REQUEST | Blame.ABORTED:
            return ()
