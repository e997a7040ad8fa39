"""What tells prompts apart that begin differently, for policies that send like to like."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Final

import orjson

from gateway.dialects import Ask
from gateway.errors import Dialect
from gateway.prompts import BYTES_PER_TOKEN
from policies.prefixes import FIRST_PREFIX_TOKENS

_FIELD: Final = {
    Dialect.GENERATE: "text",
    Dialect.COMPLETIONS: "prompt",
    Dialect.RESPONSES: "input",
    Dialect.EMBEDDINGS: "input",
}
_TAKES_IDS: Final = (Dialect.GENERATE, Dialect.CHAT, Dialect.MESSAGES)
_FIRST_BYTES: Final = FIRST_PREFIX_TOKENS * BYTES_PER_TOKEN


def prefix_keys(ask: Ask) -> tuple[int, ...]:
    """Of ever longer beginnings of the only prompt; none of a batch.

    Equal keys are prompts that begin alike and may share a cache: the text of the roles, the
    template and the tokens are the server's, but what is equal here is equal there.
    """
    if ask.batched:
        return ()
    salt = [ask.model, ask.body.get("cache_salt"), ask.body.get("extra_key")]
    return keys_of(orjson.dumps(salt), b"".join(_parts(ask.dialect, ask.body)))


def keys_of(salt: bytes, prompt: bytes) -> tuple[int, ...]:
    digest, keys = blake2b(salt, digest_size=8), list[int]()
    start, end = 0, _FIRST_BYTES
    while end <= len(prompt):
        digest.update(memoryview(prompt)[start:end])
        keys.append(int.from_bytes(digest.copy().digest(), "big"))
        start, end = end, 2 * end
    return tuple(keys)


def _parts(dialect: Dialect, body: dict[str, Any]) -> Iterator[bytes]:
    """In the order of the prompt: later turns of a conversation leave what is before as it is."""
    if dialect in _TAKES_IDS and body.get("input_ids") is not None:
        yield _packed(body["input_ids"])
    elif dialect not in _FIELD:
        yield _bytes(body.get("tools"))
        yield _bytes(body.get("system"))
        for message in body["messages"]:
            yield _bytes(message.get("role"))
            yield _bytes(message.get("content"))
    else:
        yield _bytes(body.get("instructions"))
        prompt: Any = body.get(_FIELD[dialect])
        is_ids = type(prompt) is list and type(prompt[0]) is int
        yield _packed(prompt) if is_ids else _bytes(prompt)


def _packed(ids: list[Any]) -> bytes:
    """Four bytes each, as many as a token of text counts for."""
    try:
        return array("I", ids).tobytes()
    except (OverflowError, TypeError):  # ids that no tokenizer has
        return orjson.dumps(ids)


def _bytes(content: Any) -> bytes:
    if type(content) is str:
        return content.encode("utf-8", "surrogatepass")
    return orjson.dumps(content) if content else b""
