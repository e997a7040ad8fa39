"""Part of a prompt as a request of its own: one token that nobody reads, for the server's cache.

Whatever becomes of it, the job itself is sent as its client asked for it: what the cache does not
hold is computed again, and the answer is the same.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from backends.exchange import Exchange
from backends.whole import Ids
from policies.events import Fail, Reject

_KEPT: Final = ("model", "lora_path", "cache_salt", "extra_key")
"""With another one of these, the same tokens are another entry of the cache."""
_TEMPLATED: Final = (
    *("model", "messages", "tools", "tool_choice", "chat_template_kwargs"),
    *("reasoning_effort", "continue_final_message"),
)
_UNCUT: Final = ("image_data", "video_data", "audio_data", "input_embeds", "session_params")


class Nobody:
    """The client of a part."""

    def answer(self, status: int, content_type: str, body: bytes) -> None: ...
    def begin(self) -> None: ...

    def write(self, piece: bytes) -> bool:
        return False

    def has_room(self) -> bool:
        return True

    def drop(self) -> None: ...
    def end(self) -> None: ...
    def refused(self, decision: Reject | Fail, trouble: object) -> None: ...


def known_ids(exchange: Exchange) -> Ids | None:
    """Of its prompt, without asking a server."""
    if exchange.prompt_ids is not None:
        return exchange.prompt_ids
    for name in ("input_ids", "prompt"):
        value = exchange.body.get(name)
        if type(value) is list and set(map(type, value)) == {int}:
            return value
    return None


def question(exchange: Exchange) -> bytes | None:
    """For /v1/tokenize; none where its answer would not be what the server makes of the prompt."""
    if exchange.asks is not None:
        return orjson.dumps(exchange.asks)
    body = exchange.body
    if any(body.get(name) is not None for name in _UNCUT):
        return None
    if exchange.dialect == "chat":
        return _about_messages(body)
    text = body.get("text" if exchange.dialect == "generate" else "prompt")
    if exchange.dialect not in {"generate", "completions"} or type(text) is not str:
        return None
    return orjson.dumps({"model": body.get("model") or "", "prompt": text})


def _about_messages(body: dict[str, Any]) -> bytes | None:
    if any(type(message.get("content")) not in {str, type(None)} for message in body["messages"]):
        return None
    return orjson.dumps({name: body[name] for name in _TEMPLATED if name in body})


def part_of(exchange: Exchange, ids: Ids, upto: int) -> Exchange:
    """The first tokens; the last one of the prompt is left to the job itself."""
    kept: dict[str, Any] = {name: exchange.body[name] for name in _KEPT if name in exchange.body}
    body: dict[str, Any] = {
        **kept,
        "input_ids": ids[: max(1, min(upto, len(ids) - 1))],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
        "stream": True,
    }
    return Exchange(
        job_id=exchange.job_id,
        path=b"/generate",
        dialect="generate",
        body=body,
        stream=True,
        client=Nobody(),
        priority=exchange.priority,
        first_token_timeout_s=exchange.first_token_timeout_s,
        is_part=True,
    )
