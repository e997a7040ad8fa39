"""What becomes of a row after one try: its line in a file, or a later try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson

from gateway.batch import lines
from gateway.batch.attempts import Answered, Later, Outcome
from gateway.batch.objects import Result, Row
from gateway.dialects import ROUTES
from gateway.errors import ApiError, Code, Dialect, error_body

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
_GROUPS: Final = 4
"""Rows that ended together, such as with a server, do not all come back together: if one of them is
to blame, the others are done before it is there again, or after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Back into the queue."""

    pause_us: int
    blameless: bool
    """It is the fleet's trouble: others would meet it too."""


def verdict(
    row: Row, outcome: Outcome, request_id: str, *, is_last: bool = False
) -> Result | Again:
    """`is_last`: it has been tried often enough, and what was said now is its answer."""
    if isinstance(outcome, Answered):
        return _result(row, outcome, request_id)
    if is_last:
        return _result(row, _given_up(row, outcome, request_id), request_id)
    if outcome.code in _FLEETS:
        return Again(pause_us=0, blameless=True)
    return Again(pause_us=_pause_us(row), blameless=False)


def _pause_us(row: Row) -> int:
    pause_us = min(_FIRST_PAUSE_US << min(row.attempts, 20), _LONGEST_PAUSE_US)
    return pause_us + pause_us * ((row.number - 1) % _GROUPS) // _GROUPS


def _given_up(row: Row, outcome: Later, request_id: str) -> Answered:
    """An endpoint that only newer gateways know is one of OpenAI's, too."""
    error = ApiError(outcome.code, outcome.message, param=outcome.param)
    dialect = ROUTES.get(row.endpoint, Dialect.COMPLETIONS)
    return Answered(status=error.status, body=error_body(dialect, error, request_id=request_id))


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
