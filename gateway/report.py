"""What a request leaves behind: headers for its client, a line for the log."""

from __future__ import annotations

from typing import Any

from backends.exchange import Exchange
from gateway.dialects import ROUTES
from gateway.errors import ApiError
from gateway.router import REQUEST_ID
from gateway.visit import Visit

_PATHS = {dialect: path for path, dialect in ROUTES.items()}
"""As the client asked: servers may be asked otherwise, as for chats that go as token ids."""


def header_lines(visit: Visit) -> str:
    exchange = _told_of(visit)
    pair = f"{exchange.prefill},{exchange.decode}" if exchange.prefill else exchange.decode
    return (
        f"{REQUEST_ID}: {visit.request_id}\r\n"
        f"server-timing: {_server_timing(exchange)}\r\n"
        f"x-slackwater-class: {visit.kind}\r\n"
        f"x-slackwater-worker: {pair}\r\n"
        f"{_preemption_line(visit)}"
    )


def _preemption_line(visit: Visit) -> str:
    """A stream's head goes out with its first token: it tells of those before that."""
    count = sum(part.exchange.preemptions for part in visit.parts)
    return f"x-slackwater-preemptions: {count}\r\n" if count else ""


def _told_of(visit: Visit) -> Exchange:
    """A stream's head goes out with the first token of any part: others may not be sent yet."""
    first = visit.parts[0].exchange
    if len(visit.parts) == 1:
        return first
    exchanges = (part.exchange for part in visit.parts)
    begun = (exchange for exchange in exchanges if exchange.timeline.first_token_us)
    return next(begun, first)


def _server_timing(exchange: Exchange) -> str:
    """How the time was spent so far, in milliseconds, as browsers and proxies read it."""
    times = exchange.timeline
    sent_us, first_us, ended_us = times.dispatched_us, times.first_token_us, times.ended_us
    prefilled_us = times.prefilled_us or first_us
    line = f"queue;dur={(sent_us - times.arrived_us) / 1000:.1f}"
    if prefilled_us:
        line += f", prefill;dur={(prefilled_us - sent_us) / 1000:.1f}"
    if first_us > prefilled_us:
        line += f", transfer;dur={(first_us - prefilled_us) / 1000:.1f}"
    if ended_us:
        line += f", decode;dur={(ended_us - max(sent_us, prefilled_us, first_us)) / 1000:.1f}"
    return line


def fields_of(visit: Visit, outcome: str, why: str = "") -> dict[str, Any]:
    """What the log says of a request, its timeline included; a fan-out is one request."""
    first = visit.parts[0].exchange
    times = first.timeline
    alone = len(visit.parts) == 1
    return {
        "event": "request",
        "level": "info",
        "request_id": visit.request_id,
        "rid": visit.rid,
        "path": _PATHS[visit.ask.dialect],
        "class": visit.kind.value,
        "tenant": visit.tenant,
        "outcome": outcome,
        **({"error": why} if why else {}),
        "prefill": first.prefill,
        "decode": first.decode,
        "parts": len(visit.parts),
        "attempts": first.attempts if alone else sum(p.exchange.attempts for p in visit.parts),
        "preemptions": sum(p.exchange.preemptions for p in visit.parts),
        "prompt_tokens": visit.ask.prompt_tokens,
        "tokens": first.tokens if alone else sum(p.exchange.tokens for p in visit.parts),
        "queue_ms": _ms(times.arrived_us, times.dispatched_us),
        "prefill_ms": _ms(times.dispatched_us, times.prefilled_us),
        "ttft_ms": _ms(times.arrived_us, times.first_token_us),
        "total_ms": _ms(times.arrived_us, times.ended_us),
    }


def fields_of_refusal(path: str, error: ApiError, request_id: str) -> dict[str, Any]:
    """What the log says of a request that became no job."""
    return {
        "event": "request",
        "level": "info",
        "request_id": request_id,
        "path": path,
        "outcome": error.code,
        "error": error.message,
    }


def _ms(start_us: int, end_us: int) -> float | None:
    return (end_us - start_us + 5) // 10 / 100 if start_us and end_us else None
