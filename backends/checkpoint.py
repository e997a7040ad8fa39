"""What is kept of an answer under way, so that it can go on after the gateway itself has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from backends.exchange import Exchange
from backends.progress import Kind
from backends.transcript import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """As far as an answer is settled: no character is held back behind its last token."""

    output_ids: list[int]
    text: str
    meta: dict[str, Any]
    """What came with it: the `meta_info`, or of a completion the id, the time and the model."""
    prompt_ids: list[int] | None = None
    """Where a server has told them, so that no other has to be asked."""

    @property
    def tokens(self) -> int:
        return len(self.output_ids)

    def as_bytes(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def of(cls, raw: bytes) -> Checkpoint | None:
        """None where another version of the gateway has written something else: it is made anew."""
        try:
            return cls(**orjson.loads(raw))
        except (orjson.JSONDecodeError, TypeError):
            return None


def taken_of(exchange: Exchange) -> Checkpoint | None:
    """None before there is a token to keep, and where an answer cannot go on from its tokens."""
    transcript = exchange.transcript
    if transcript is None or not exchange.has_begun:
        return None
    state = transcript.state()
    settled = state.settled()
    if not settled.output_ids or state.finish_reason or state.error:
        return None
    meta = settled.last_meta
    if settled.kind is not Kind.COMPLETIONS:
        meta = meta | {
            "prompt_tokens": settled.prompt_tokens,
            "cached_tokens": settled.cached_tokens,
            "completion_tokens": len(settled.output_ids),
        }
    return Checkpoint(
        output_ids=settled.output_ids,
        text=settled.text,
        meta=meta,
        prompt_ids=exchange.prompt_ids,
    )


def go_on_from(exchange: Exchange, checkpoint: Checkpoint) -> None:
    """As if the exchange had been preempted there: its next attempt resumes."""
    make = _chunk if "prompt" in exchange.body else _event
    exchange.transcript = Transcript.begun(exchange.body, make(checkpoint))
    exchange.tokens = checkpoint.tokens
    exchange.prompt_ids = checkpoint.prompt_ids


def _event(checkpoint: Checkpoint) -> dict[str, Any]:
    event: dict[str, Any] = {"output_ids": checkpoint.output_ids, "meta_info": checkpoint.meta}
    return event | ({"text": checkpoint.text} if checkpoint.text else {})


def _chunk(checkpoint: Checkpoint) -> dict[str, Any]:
    choice = {"index": 0, "token_ids": checkpoint.output_ids, "text": checkpoint.text}
    return checkpoint.meta | {"choices": [choice]}
