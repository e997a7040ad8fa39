"""The shapes of the OpenAI responses route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backends.emulator.calls import BadBody, Body, Call
from backends.emulator.dialects import OpenAi, Piece
from backends.emulator.messages import named
from backends.engine import Resident


def as_chat(body: Body) -> dict[str, Any]:
    """Instructions and input as chat messages."""
    given = body.get("input")
    if isinstance(given, str):
        messages: list[Any] = [{"role": "user", "content": given}]
    elif isinstance(given, list) and given:
        messages = list(given)
    else:
        raise BadBody("input: a string or a non-empty list is required")
    if body.get("instructions"):
        messages = [{"role": "system", "content": body["instructions"]}, *messages]
    limit = body.get("max_output_tokens")
    rid = {"rid": body["request_id"]} if body.get("request_id") else {}
    return {**body, **rid, "messages": messages, "max_completion_tokens": limit}


STATUSES = {"length": "incomplete", "abort": "failed"}
"""Of an answer by its finish reason; all others are complete."""


class Responses(OpenAi):
    """/v1/responses, one answer of it: its events are numbered."""

    def __init__(self) -> None:
        self._told = 0

    def event(self, call: Call, piece: Piece) -> bytes:
        place = {"item_id": f"msg_{piece.resident.request.rid}", "output_index": 0}
        spot = {**place, "content_index": 0}
        parts = []
        if piece.first:
            begun, item = self.envelope(call, piece.resident), _item(piece, "in_progress")
            parts += [
                self._named("response.created", response=begun),
                self._named("response.in_progress", response=begun),
                self._named("response.output_item.added", output_index=0, item=item),
                self._named("response.content_part.added", **spot, part=_text("")),
            ]
        if piece.new_text:
            delta = {"delta": piece.new_text, "logprobs": []}
            parts.append(self._named("response.output_text.delta", **spot, **delta))
        if piece.reason is not None:
            whole, item = self.whole(call, [piece]), _item(piece, "completed")
            parts += [
                self._named("response.output_text.done", **spot, text=piece.text, logprobs=[]),
                self._named("response.content_part.done", **spot, part=_text(piece.text)),
                self._named("response.output_item.done", output_index=0, item=item),
                self._named(f"response.{whole['status']}", response=whole),
            ]
        return b"".join(parts)

    def _named(self, kind: str, **fields: Any) -> bytes:
        number, self._told = self._told, self._told + 1
        return named(kind, {**fields, "sequence_number": number})

    def closing(self, call: Call, residents: Sequence[Resident]) -> bytes:
        return b""

    def whole(self, call: Call, pieces: Sequence[Piece]) -> dict[str, Any]:
        piece = pieces[0]
        resident = piece.resident
        status = STATUSES.get((piece.reason or {}).get("type", ""), "completed")
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        prompt, generated = resident.request.prompt.tokens, resident.generated
        return self.envelope(call, resident) | {
            "status": status,
            "incomplete_details": cut,
            "error": {"code": "server_error", "message": piece.reason.get("message")}
            if status == "failed" and piece.reason
            else None,
            "output": [_item(piece, "completed")],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + generated,
            },
        }

    def envelope(self, call: Call, resident: Resident) -> dict[str, Any]:
        return {
            "id": f"resp_{resident.request.rid}",
            "object": "response",
            "created_at": call.created,
            "status": "in_progress",
            "model": call.model,
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }


def _item(piece: Piece, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{piece.resident.request.rid}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text(piece.text)] if status == "completed" else [],
    }


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
