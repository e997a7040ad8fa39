"""What becomes of a row after one try: its line in a file, or a later try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.batch import lines
from gateway.batch.attempts import Answered, Later, Outcome, dialect_of
from gateway.batch.objects import Result, Row
from gateway.errors import ApiError, Code, error_body

_FLEETS: Final = frozenset(
    {
        *(Code.WORKERS_UNAVAILABLE, Code.NO_WORKER, Code.QUEUE_FULL, Code.UPSTREAM_OVERLOADED),
        *(Code.GATEWAY_DRAINING, Code.DEADLINE_HOPELESS, Code.DEADLINE_PASSED),
        Code.STORAGE_UNAVAILABLE,
    }
)
"""What is said of all rows alike: nothing is wrong with this one."""
_FIRST_PAUSE_US: Final = 1_000_000
_LONGEST_PAUSE_US: Final = 300_000_000
ENGINE_ERRORS: Final = 8
"""So many times a living server may fail a row (each time after all attempts of a request)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Back into the queue."""

    pause_us: int
    blameless: bool
    """It is the fleet's trouble: others would meet it too."""


def verdict(row: Row, outcome: Outcome, request_id: str, engine_errors: int) -> Result | Again:
    """`engine_errors`: how many there were of this row, this one included."""
    if isinstance(outcome, Answered):
        return _result(row, outcome, request_id)
    if engine_errors >= ENGINE_ERRORS:
        return _result(row, _given_up(row, outcome, request_id), request_id)
    if outcome.code in _FLEETS:
        return Again(pause_us=0, blameless=True)
    pause_us = min(_FIRST_PAUSE_US << min(row.attempts, 20), _LONGEST_PAUSE_US)
    return Again(pause_us=pause_us, blameless=False)


def _given_up(row: Row, outcome: Later, request_id: str) -> Answered:
    error = ApiError(outcome.code, outcome.message)
    body = error_body(dialect_of(row.endpoint), error, request_id=request_id)
    return Answered(status=error.status, body=body)


def _result(row: Row, answered: Answered, request_id: str) -> Result:
    failed = answered.status >= 400
    line = lines.answered(row, status=answered.status, request_id=request_id, body=answered.body)
    if failed:
        return Result(row=row, failed=True, line=line)
    prompt, generated, cached = usage_of(answered.body)
    return Result(
        row=row,
        failed=False,
        line=line,
        prompt_tokens=prompt,
        generated_tokens=generated or answered.tokens,
        cached_tokens=cached,
    )


def usage_of(body: bytes) -> tuple[int, int, int]:
    """Tokens of the prompt, of the answer, and of the prompt's cached part, as the server says."""
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        return 0, 0, 0
    answers = told if type(told) is list else [told]
    found = [_usage(one) for one in answers if type(one) is dict]
    prompt, generated, cached = zip(*found, strict=True) if found else ((), (), ())
    return sum(prompt), sum(generated), sum(cached)


def _usage(answer: dict[str, Any]) -> tuple[int, int, int]:
    if type(meta := answer.get("meta_info")) is dict:
        return (
            _count(meta, "prompt_tokens"),
            _count(meta, "completion_tokens"),
            _count(meta, "cached_tokens"),
        )
    usage = answer.get("usage")
    if type(usage) is not dict:
        return 0, 0, 0
    prefix = "input" if "input_tokens" in usage else "prompt"
    details = usage.get(f"{prefix}_tokens_details")
    return (
        _count(usage, f"{prefix}_tokens"),
        _count(usage, "output_tokens") or _count(usage, "completion_tokens"),
        _count(details, "cached_tokens") if type(details) is dict else 0,
    )


def _count(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if type(value) is int else 0
