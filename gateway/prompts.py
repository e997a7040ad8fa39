"""How many prompts a body holds, and how long they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeGuard

import orjson

from gateway.errors import Dialect, invalid

MEDIA_FIELDS: Final = ("image_data", "video_data", "audio_data")
BYTES_PER_TOKEN: Final = 4
SURELY: Final = 4
"""No text is so dense that its tokens are estimated at more than this multiple of their number."""
MEDIA_TOKENS: Final = 1_024
"""What an image, a sound or a clip counts for: its true number is only known to the server."""


def all_of(values: Any, kind: type) -> TypeGuard[list[Any]]:
    """A non-empty list of exactly this type: in JSON true is not an integer."""
    return type(values) is list and set(map(type, values)) == {kind}


Prompts = tuple[int, bool, int]
"""How many, whether they came as a list, and their tokens together."""


def _generate_prompts(body: dict[str, Any]) -> Prompts:
    given = [name for name in ("text", "input_ids", "input_embeds") if body.get(name) is not None]
    if len(given) != 1:
        raise invalid("text", "or input_ids or input_embeds must be given, and only one of them")
    prompts, batched, tokens = _FORMS[given[0]](given[0], body[given[0]])
    return prompts, batched, tokens + MEDIA_TOKENS * _media(body, prompts)


def _completion_prompts(body: dict[str, Any]) -> Prompts:
    return _read_prompt("prompt", body.get("prompt"))


def _embedding_prompts(body: dict[str, Any]) -> Prompts:
    value = body.get("input")
    if all_of(value, dict):
        return len(value), True, _tokens(_text_bytes(value))
    return _read_prompt("input", value)


def _read_prompt(name: str, value: Any) -> Prompts:
    """Texts or token ids, one or many."""
    if type(value) is str or (type(value) is list and value and type(value[0]) is str):
        return _read_texts(name, value)
    if type(value) is list:
        return _read_ids(name, value)
    raise invalid(name, "must be a string, a list of strings, or token ids")


def _read_texts(name: str, value: Any) -> Prompts:
    if type(value) is str:
        return 1, False, _tokens(_utf8_bytes(value))
    if all_of(value, str):
        return len(value), True, sum(_tokens(_utf8_bytes(text)) for text in value)
    raise invalid(name, "must be a string or a list of strings that is not empty")


def _read_ids(name: str, value: Any) -> Prompts:
    if type(value) is list and value and type(value[0]) is list:
        return len(value), True, sum(_count_ids(name, ids) for ids in value)
    return 1, False, _count_ids(name, value)


def _count_ids(name: str, ids: Any) -> int:
    if not all_of(ids, int) or min(ids) < 0:
        raise invalid(name, "must be a list of token ids from 0 on, or of such lists, not empty")
    return len(ids)


def _read_embeds(name: str, value: Any) -> Prompts:
    if not all_of(value, list) or not all(value):
        raise invalid(name, "must be a list of vectors, or a list of such lists")
    if type(value[0][0]) is not list:
        return 1, False, len(value)
    return len(value), True, sum(map(len, value))


_FORMS: Final[dict[str, Callable[[str, Any], Prompts]]] = {
    "text": _read_texts,
    "input_ids": _read_ids,
    "input_embeds": _read_embeds,
}


def _media(body: dict[str, Any], prompts: int) -> int:
    """A list is one item (or a list of them) for each prompt, anything else goes to all."""
    found = 0
    for name in MEDIA_FIELDS:
        if (value := body.get(name)) is not None:
            items = value if type(value) is list else [value] * prompts
            found += sum(len(item) if type(item) is list else 1 for item in items)
    return found


def _conversation(name: str, *also: str) -> Callable[[dict[str, Any]], Prompts]:
    def prompts(body: dict[str, Any]) -> Prompts:
        if body.get("input_ids") is not None:
            return 1, False, _count_ids("input_ids", body["input_ids"])
        length = _messages_bytes(name, body.get(name))
        for extra in also:
            if extra in body:
                length += _extra_bytes(body[extra])
        return 1, False, _tokens(length)

    return prompts


def _messages_bytes(name: str, messages: Any) -> int:
    if type(messages) is not list or not messages:
        raise invalid(name, "must be a list of messages that is not empty")
    length = 0
    for message in messages:
        if type(message) is not dict or type(message.get("role")) is not str:
            raise invalid(name, "must hold objects that have a role")
        content = message.get("content")
        if type(content) is str and content.isascii():
            length += len(content)
        elif content is not None:
            length += _content_bytes(name, content)
        if len(message) > 2 and message.get("tool_calls"):
            length += len(orjson.dumps(message["tool_calls"]))
    return length


def _content_bytes(name: str, content: Any) -> int:
    if type(content) is not str and type(content) is not list:
        raise invalid(f"{name}.content", "must be a string or a list of parts")
    return _text_bytes(content)


def _responses_prompts(body: dict[str, Any]) -> Prompts:
    """Items of many kinds go on as they are; only their text is counted."""
    value = body.get("input")
    if type(value) is not str and not all_of(value, dict):
        raise invalid("input", "must be a string or a list of items that is not empty")
    length = _text_bytes(value) + sum(_extra_bytes(body.get(name)) for name in _RESPONSES_EXTRAS)
    return 1, False, _tokens(length)


_RESPONSES_EXTRAS: Final = ("instructions", "tools")


def _extra_bytes(value: Any) -> int:
    """System prompts and instructions are text or parts of it; tools are counted as written."""
    if type(value) is str:
        return _utf8_bytes(value)
    return len(orjson.dumps(value)) if value else 0


def _text_bytes(content: Any, depth: int = 4) -> int:
    """The text in a message's parts; whatever has neither text nor content is a medium."""
    if type(content) is str:
        return _utf8_bytes(content)
    if type(content) is list and depth:
        return sum(_text_bytes(part, depth - 1) for part in content)
    if type(content) is not dict:
        return 0
    for key in ("text", "content", "arguments", "input", "output"):
        if (inner := content.get(key)) is not None:
            return _text_bytes(inner, depth - 1) if depth else 0
    return MEDIA_TOKENS * BYTES_PER_TOKEN


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _tokens(length: int) -> int:
    return -(-length // BYTES_PER_TOKEN)


_PROMPTS: Final[dict[Dialect, Callable[[dict[str, Any]], Prompts]]] = {
    Dialect.GENERATE: _generate_prompts,
    Dialect.CHAT: _conversation("messages", "tools"),
    Dialect.COMPLETIONS: _completion_prompts,
    Dialect.RESPONSES: _responses_prompts,
    Dialect.MESSAGES: _conversation("messages", "system", "tools"),
    Dialect.EMBEDDINGS: _embedding_prompts,
}


def at_least(dialect: Dialect, body: dict[str, Any], estimated: int) -> int:
    """Tokens that a prompt has for sure: all where ids were sent, of a text some."""
    given = body.get("prompt" if dialect is Dialect.COMPLETIONS else "input_ids")
    is_ids = type(given) is list and bool(given) and type(given[0]) in (int, list)
    if (
        is_ids
        and dialect is not Dialect.RESPONSES
        and not any(body.get(name) for name in MEDIA_FIELDS)
    ):
        return estimated
    return estimated // SURELY


def read_prompts(dialect: Dialect, body: dict[str, Any]) -> Prompts:
    return _PROMPTS[dialect](body)
