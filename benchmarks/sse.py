"""What a bare worker says: bodies and event streams shaped as SGLang shapes them, rendered once."""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from typing import Any

import orjson

MODEL = "bare"
PROMPT_TOKENS = 8
HEAD_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
DONE = b"data: [DONE]\n\n"
TOKEN_MARK = b'"tok'
"""Begins the text of each token and occurs nowhere else: a client counts it, and parses nothing."""


class Shape(StrEnum):
    GENERATE = "/generate"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def chunk(body: bytes) -> bytes:
    """One piece of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def usage(tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }


def chat_event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return openai_event("chat.completion.chunk", choice)


def text_event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return openai_event("text_completion", choice)


def openai_event(kind: str, choice: dict[str, Any]) -> bytes:
    head = {"id": "bare-1", "object": kind, "created": 1, "model": MODEL}
    return event({**head, "choices": [{**choice, "matched_stop": None}], "usage": None})


def native(text: str, ids: list[int], completed: int, finish: dict[str, Any] | None) -> Any:
    meta = {
        "id": "bare-1",
        "finish_reason": finish,
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": completed,
        "cached_tokens": 0,
        "weight_version": "default",
    }
    return {"text": text, "output_ids": ids, "meta_info": meta}


def length(tokens: int) -> dict[str, Any]:
    return {"type": "length", "length": tokens}


def chat_events(tokens: int) -> list[list[bytes]]:
    steps = [[chat_event({"content": f"tok{at} "})] for at in range(tokens)]
    steps[0].insert(0, chat_event({"role": "assistant", "content": ""}))
    steps[-1].append(chat_event({}, "length"))
    return steps


def completion_events(tokens: int) -> list[list[bytes]]:
    steps = [[text_event(f"tok{at} ")] for at in range(tokens)]
    steps[-1].append(text_event("", "length"))
    return steps


def native_events(tokens: int) -> list[list[bytes]]:
    """Deltas, as with `--incremental-streaming-output`: the cumulative form grows by the square."""
    last = tokens - 1
    return [
        [event(native(f"tok{at} ", [at], at + 1, length(tokens) if at == last else None))]
        for at in range(tokens)
    ]


EVENTS = {
    Shape.CHAT: chat_events,
    Shape.COMPLETIONS: completion_events,
    Shape.GENERATE: native_events,
}


@lru_cache(maxsize=64)
def stream_steps(shape: Shape, tokens: int) -> tuple[bytes, ...]:
    """What goes onto the wire at each decode step; the last one ends the answer."""
    steps = [b"".join(map(chunk, events)) for events in EVENTS[shape](tokens)]
    steps[-1] += chunk(DONE) + b"0\r\n\r\n"
    return tuple(steps)


@lru_cache(maxsize=64)
def whole_body(shape: Shape, tokens: int) -> bytes:
    text = "".join(f"tok{at} " for at in range(tokens))
    if shape is Shape.GENERATE:
        return orjson.dumps(native(text, list(range(tokens)), tokens, length(tokens)))
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
    if shape is Shape.CHAT:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    kind = "chat.completion" if shape is Shape.CHAT else "text_completion"
    head = {"id": "bare-1", "object": kind, "created": 1, "model": MODEL}
    return orjson.dumps({**head, "choices": [choice], "usage": usage(tokens)})
