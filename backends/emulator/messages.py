"""The shapes of the Anthropic messages route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from backends.emulator.calls import Body, Call
from backends.emulator.dialects import Piece
from backends.engine import Resident

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}
ERROR_KINDS = {400: "invalid_request_error", 503: "overloaded_error"}


def as_chat(body: Body) -> dict[str, Any]:
    """The chat body that SGLang makes of it; of the other fields only the pair's are kept."""
    system = body.get("system")
    before = [{"role": "system", "content": system}] if system else []
    kept = ("model", "max_tokens", "stream", "bootstrap_host", "bootstrap_port", "bootstrap_room")
    chat: dict[str, Any] = {key: body[key] for key in kept if key in body}
    messages = body.get("messages")
    chat["messages"] = before + messages if isinstance(messages, list) else messages
    chat["stop"] = body.get("stop_sequences")
    return chat


class Messages:
    """/v1/messages: named events, no [DONE]."""

    headers_at_once = False

    def event(self, call: Call, piece: Piece) -> bytes:
        parts = []
        if piece.first:
            start = self._message(call, piece.resident) | {"content": []}
            parts.append(named("message_start", {"message": start}))
            block = {"type": "text", "text": ""}
            parts.append(named("content_block_start", {"index": 0, "content_block": block}))
        if piece.new_text:
            delta = {"type": "text_delta", "text": piece.new_text}
            parts.append(named("content_block_delta", {"index": 0, "delta": delta}))
        if piece.reason is not None:
            parts.append(named("content_block_stop", {"index": 0}))
            ending = {"stop_reason": STOP_REASONS[piece.reason["type"]], "stop_sequence": None}
            used = {"output_tokens": piece.resident.generated}
            parts.append(named("message_delta", {"delta": ending, "usage": used}))
        return b"".join(parts)

    def closing(self, call: Call, residents: Sequence[Resident]) -> bytes:
        return named("message_stop", {})

    def whole(self, call: Call, pieces: Sequence[Piece]) -> object:
        piece = pieces[0]
        reason = piece.reason or {"type": "stop"}
        return self._message(call, piece.resident) | {
            "content": [{"type": "text", "text": piece.text}],
            "stop_reason": STOP_REASONS[reason["type"]],
        }

    def in_band(self, status: int, message: str) -> bytes:
        return named("error", {"error": self._error(status, message)})

    def refusal(self, status: int, message: str) -> object:
        return {"type": "error", "error": self._error(status, message)}

    @staticmethod
    def _error(status: int, message: str) -> dict[str, Any]:
        return {"type": ERROR_KINDS.get(status, "api_error"), "message": message}

    @staticmethod
    def _message(call: Call, resident: Resident) -> dict[str, Any]:
        return {
            "id": f"msg_{resident.request.rid}",
            "type": "message",
            "role": "assistant",
            "model": call.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": resident.request.prompt.tokens,
                "output_tokens": resident.generated,
            },
        }


def named(kind: str, value: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **value}))
