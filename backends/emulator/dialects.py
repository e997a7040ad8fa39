"""The shapes in which SGLang answers: native, OpenAI completions and chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import orjson

from backends.emulator.calls import Call
from backends.emulator.tokenizer import decode
from backends.engine import Resident

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer says now: everything so far, and what is new since the last time."""

    index: int
    resident: Resident
    text: str
    new_text: str
    ids: list[int]
    new_ids: list[int]
    reason: dict[str, Any] | None
    first: bool
    now_s: float


class Dialect(Protocol):
    """How one route speaks; `headers_at_once` is the status line before the first token."""

    headers_at_once: bool

    def event(self, call: Call, piece: Piece) -> bytes: ...

    def closing(self, call: Call, residents: Sequence[Resident]) -> bytes: ...

    def whole(self, call: Call, pieces: Sequence[Piece]) -> object: ...

    def in_band(self, status: int, message: str) -> bytes: ...

    def refusal(self, status: int, message: str) -> object: ...


def sse(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def error_object(status: int, message: str, kind: str | None = None) -> dict[str, Any]:
    kind = HTTPStatus(status).name if kind is None else kind
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


def usage(residents: Sequence[Resident]) -> dict[str, Any]:
    prompt = sum({id(it.request.prompt): it.request.prompt.tokens for it in residents}.values())
    generated = sum(it.generated for it in residents)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
    }


class Native:
    """/generate: cumulative unless the server streams incrementally."""

    headers_at_once = True

    def __init__(self, *, incremental: bool) -> None:
        self._incremental = incremental

    def event(self, call: Call, piece: Piece) -> bytes:
        answer = self._answer(piece, incremental=self._incremental)
        return sse({**answer, "index": piece.index} if call.many else answer)

    def closing(self, call: Call, residents: Sequence[Resident]) -> bytes:
        return DONE

    def whole(self, call: Call, pieces: Sequence[Piece]) -> object:
        answers = [self._answer(piece, incremental=False) for piece in pieces]
        return answers if call.many else answers[0]

    def in_band(self, status: int, message: str) -> bytes:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return sse(
            {"error": {"message": message, "type": kind, "code": status, "retryable": False}}
        )

    def refusal(self, status: int, message: str) -> object:
        if status == 400:
            return {"error": {"message": message}}
        return error_object(status, message, str(status))

    def _answer(self, piece: Piece, *, incremental: bool) -> dict[str, Any]:
        resident = piece.resident
        meta: dict[str, Any] = {
            "id": resident.request.rid,
            "finish_reason": piece.reason,
            "prompt_tokens": resident.request.prompt.tokens,
            "weight_version": "default",
            "num_retractions": resident.retractions,
            "completion_tokens": resident.generated,
            "cached_tokens": resident.cached_tokens,
            "cached_tokens_details": {"device": resident.cached_tokens, "host": 0},
            "reasoning_tokens": 0,
            "dp_rank": None,
        }
        if piece.reason is not None:
            meta["e2e_latency"] = piece.now_s - resident.arrived_s
        meta["response_sent_to_client_ts"] = piece.now_s
        return {
            "text": piece.new_text if incremental else piece.text,
            "output_ids": piece.new_ids if incremental else piece.ids,
            "meta_info": meta,
        }


class OpenAi:
    """What chat and completions share: errors, usage and the last chunk."""

    headers_at_once = False

    def closing(self, call: Call, residents: Sequence[Resident]) -> bytes:
        options = call.body.get("stream_options") or {}
        if not options.get("include_usage"):
            return DONE
        chunk = self.envelope(call, residents[0]) | {"choices": [], "usage": usage(residents)}
        return sse(chunk) + DONE

    def in_band(self, status: int, message: str) -> bytes:
        return sse({"error": error_object(status, message)})

    def refusal(self, status: int, message: str) -> object:
        return error_object(status, message, "BadRequestError" if status == 400 else str(status))

    def envelope(self, call: Call, resident: Resident) -> dict[str, Any]:
        raise NotImplementedError


class Completions(OpenAi):
    """/v1/completions."""

    def envelope(self, call: Call, resident: Resident) -> dict[str, Any]:
        return {
            "id": resident.request.rid,
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
        }

    def event(self, call: Call, piece: Piece) -> bytes:
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.new_text,
            "logprobs": None,
            **openai_finish(piece.reason),
        }
        if call.body.get("return_token_ids"):
            choice["token_ids"] = piece.new_ids
            if piece.first:
                choice["prompt_token_ids"] = list(call.prompts[piece.index])
        return sse(self.envelope(call, piece.resident) | {"choices": [choice], "usage": None})

    def whole(self, call: Call, pieces: Sequence[Piece]) -> object:
        choices = [self._choice(call, piece) for piece in pieces]
        envelope = self.envelope(call, pieces[0].resident)
        return {
            **envelope,
            "choices": choices,
            "usage": usage([it.resident for it in pieces]),
            "metadata": {"weight_version": "default"},
        }

    def _choice(self, call: Call, piece: Piece) -> dict[str, Any]:
        echo = decode(call.prompts[piece.index]) if call.body.get("echo") else ""
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": echo + piece.text,
            "logprobs": None,
            **openai_finish(piece.reason),
        }
        if call.body.get("return_token_ids"):
            choice["token_ids"] = piece.ids
            choice["prompt_token_ids"] = list(call.prompts[piece.index])
        return choice


class Chat(OpenAi):
    """/v1/chat/completions: a role chunk, deltas, a finish chunk."""

    def envelope(self, call: Call, resident: Resident) -> dict[str, Any]:
        return {
            "id": resident.request.rid,
            "object": "chat.completion.chunk",
            "created": call.created,
            "model": call.model,
        }

    def event(self, call: Call, piece: Piece) -> bytes:
        chunks = []
        if piece.first:
            chunks.append(self._chunk(call, piece, {"role": "assistant", "content": ""}, None))
        if piece.new_text:
            chunks.append(self._chunk(call, piece, {"content": piece.new_text}, None))
        if piece.reason is not None:
            chunks.append(self._chunk(call, piece, {"content": None}, piece.reason))
        return b"".join(chunks)

    def whole(self, call: Call, pieces: Sequence[Piece]) -> object:
        choices = [
            {
                "index": piece.index,
                "message": {
                    "role": "assistant",
                    "content": piece.text,
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                **openai_finish(piece.reason),
            }
            for piece in pieces
        ]
        envelope = self.envelope(call, pieces[0].resident) | {"object": "chat.completion"}
        return {
            **envelope,
            "choices": choices,
            "usage": usage([it.resident for it in pieces]),
            "metadata": {"weight_version": "default"},
        }

    def _chunk(
        self, call: Call, piece: Piece, delta: dict[str, Any], reason: dict[str, Any] | None
    ) -> bytes:
        full_delta = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
        choice = {
            "index": piece.index,
            "delta": full_delta | delta,
            "logprobs": None,
            **openai_finish(reason),
        }
        return sse(self.envelope(call, piece.resident) | {"choices": [choice], "usage": None})


def openai_finish(reason: dict[str, Any] | None) -> dict[str, Any]:
    if reason is None:
        return {"finish_reason": None, "matched_stop": None}
    return {"finish_reason": reason["type"], "matched_stop": reason.get("matched")}
