"""What a request leaves behind: headers for its client, a line for the log."""

from __future__ import annotations

from typing import Any

import structlog

from backends.exchange import Exchange
from gateway.visit import Visit

log = structlog.get_logger("slackwater.request")

REQUEST_ID = "x-request-id"


def headers_of(visit: Visit) -> dict[str, str]:
    exchange = visit.parts[0].exchange
    pair = f"{exchange.prefill},{exchange.decode}" if exchange.prefill else exchange.decode
    return {
        REQUEST_ID: visit.request_id,
        "server-timing": _server_timing(exchange),
        "x-slackwater-class": visit.kind.value,
        "x-slackwater-worker": pair,
    }


def _server_timing(exchange: Exchange) -> str:
    """How the time was spent so far, in milliseconds, as browsers and proxies read it."""
    times = exchange.timeline
    spans = [("queue", times.arrived_us, times.dispatched_us)]
    if times.prefilled_us:
        spans.append(("prefill", times.dispatched_us, times.prefilled_us))
        spans.append(("transfer", times.prefilled_us, times.first_token_us))
    else:
        spans.append(("prefill", times.dispatched_us, times.first_token_us))
    since_us = times.first_token_us or times.prefilled_us or times.dispatched_us
    spans.append(("decode", since_us, times.ended_us))
    known = [(name, start, end) for name, start, end in spans if start and end > start]
    return ", ".join(f"{name};dur={(end - start) / 1000:.1f}" for name, start, end in known)


def log_line(visit: Visit, outcome: str) -> None:
    """One line a request, with its timeline; parts of a fan-out are summed up."""
    first = visit.parts[0].exchange
    times = first.timeline
    several: dict[str, Any] = {"parts": len(visit.parts)} if len(visit.parts) > 1 else {}
    log.info(
        "request",
        request_id=visit.request_id,
        path=first.path.decode(),
        kind=visit.kind.value,
        tenant=visit.tenant,
        outcome=outcome,
        prefill=first.prefill,
        decode=first.decode,
        attempts=sum(part.exchange.attempts for part in visit.parts),
        prompt_tokens=visit.ask.prompt_tokens,
        tokens=sum(part.exchange.tokens for part in visit.parts),
        queue_ms=_ms(times.arrived_us, times.dispatched_us),
        prefill_ms=_ms(times.dispatched_us, times.prefilled_us),
        ttft_ms=_ms(times.arrived_us, times.first_token_us),
        total_ms=_ms(times.arrived_us, times.ended_us),
        **several,
    )


def _ms(start_us: int, end_us: int) -> float | None:
    return round((end_us - start_us) / 1000, 2) if start_us and end_us else None
