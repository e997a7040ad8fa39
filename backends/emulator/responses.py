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
    """/v1/responses: numbered events."""

    def event(self, call: Call, piece: Piece) -> bytes:
        where = {"item_id": f"msg_{piece.resident.request.rid}", "output_index": 0}
        spot = {**where, "content_index": 0}
        parts = []
        if piece.first:
            begun = self.envelope(call, piece.resident)
            parts.append(named("response.created", {"response": begun}))
            parts.append(named("response.in_progress", {"response": begun}))
        if piece.new_text:
            parts.append(named("response.output_text.delta", {**spot, "delta": piece.new_text}))
        if piece.reason is not None:
            parts.append(named("response.output_text.done", {**spot, "text": piece.text}))
            whole = self.whole(call, [piece])
            parts.append(named(f"response.{whole['status']}", {"response": whole}))
        return b"".join(parts)

    def closing(self, call: Call, residents: Sequence[Resident]) -> bytes:
        return b""

    def whole(self, call: Call, pieces: Sequence[Piece]) -> dict[str, Any]:
        piece = pieces[0]
        resident = piece.resident
        status = STATUSES.get((piece.reason or {}).get("type", ""), "completed")
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        item = {
            "id": f"msg_{resident.request.rid}",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": piece.text, "annotations": []}],
        }
        prompt, generated = resident.request.prompt.tokens, resident.generated
        return self.envelope(call, resident) | {
            "status": status,
            "incomplete_details": cut,
            "error": {"code": "server_error", "message": piece.reason.get("message")}
            if status == "failed" and piece.reason
            else None,
            "output": [item],
            "usage": {
                "input_tokens": prompt,
                "output_tokens": generated,
                "total_tokens": prompt + generated,
            },
        }

    def envelope(self, call: Call, resident: Resident) -> dict[str, Any]:
        return {
            "id": f"resp_{resident.request.rid}",
            "object": "response",
            "created_at": int(resident.arrived_s),
            "status": "in_progress",
            "model": call.model,
            "output": [],
        }
