"""What clients ask of files and batches, checked before anything is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from multidict import MultiMapping

from gateway.batch.kept import Order
from gateway.batch.objects import NewBatch, Purpose
from gateway.batch.progress import KEY
from gateway.batch.window import in_words, seconds_of
from gateway.errors import ApiError, Code, invalid

ENDPOINTS: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
)
_EXPIRES_S: Final = (3_600, 2_592_000)
_BATCH_FIELDS: Final = frozenset(
    {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
)
_METADATA: Final = 16
_KEY_CHARS: Final = 64
_VALUE_CHARS: Final = 512
_ID_CHARS: Final = 64
_SHOWN_CHARS: Final = 40
_NAME_CHARS: Final = 255
FILES_AT_ONCE: Final = 10_000
BATCHES_AT_ONCE: Final = 100
_BATCHES_BY_DEFAULT: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    limit: int
    after: str | None
    order: Order = "desc"
    purpose: Purpose | None = None


def files_listing(query: MultiMapping[str]) -> Listing:
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", "must be asc or desc")
    named = query.get("purpose")
    if named is not None and named not in [*Purpose]:
        raise invalid("purpose", f"must be one of {', '.join(Purpose)}")
    return Listing(
        limit=_limit(query, FILES_AT_ONCE, FILES_AT_ONCE),
        after=_after(query),
        order="asc" if order == "asc" else "desc",
        purpose=None if named is None else Purpose(named),
    )


def batches_listing(query: MultiMapping[str]) -> Listing:
    limit = _limit(query, BATCHES_AT_ONCE, _BATCHES_BY_DEFAULT)
    return Listing(limit=limit, after=_after(query))


def _after(query: MultiMapping[str]) -> str | None:
    given = query.get("after") or None
    return None if given is None else _id(given, "after")


def _limit(query: MultiMapping[str], most: int, default: int) -> int:
    given = query.get("limit")
    if given is None:
        return default
    if not (given.isascii() and given.isdigit()) or not 1 <= int(given[:9]) <= most:
        raise invalid("limit", f"must be a number from 1 to {most}")
    return int(given)


def new_batch(raw: bytes, tenant: str, batch_id: str, max_window_s: float) -> NewBatch:
    body = _object(raw)
    if unknown := sorted(body.keys() - _BATCH_FIELDS):
        message = f"there is no parameter {unknown[0]}"
        raise ApiError(Code.UNKNOWN_PARAMETER, message, param=unknown[0])
    endpoint = body.get("endpoint")
    if endpoint not in ENDPOINTS:
        raise invalid("endpoint", f"must be one of {', '.join(ENDPOINTS)}")
    window, window_s = _window(body.get("completion_window"), max_window_s)
    return NewBatch(
        id=batch_id,
        tenant=tenant,
        endpoint=endpoint,
        window=window,
        window_us=window_s * 1_000_000,
        input_file_id=_id(body.get("input_file_id"), "input_file_id"),
        metadata=_metadata(body.get("metadata")),
        output_expires_s=_expiry(body.get("output_expires_after"), "output_expires_after"),
    )


def _window(value: Any, most_s: float) -> tuple[str, int]:
    if not isinstance(value, str):
        raise invalid("completion_window", "must be a duration such as 24h, 90m or 1h30m")
    if (seconds := seconds_of(value)) is None:
        problem = f"is {_shown(value)}, which is no duration: 24h, 90m, 1h30m and 7d are some"
        raise invalid("completion_window", problem)
    if seconds > most_s:
        problem = f"is {_shown(value)}, and may be {in_words(most_s)} at most"
        raise invalid("completion_window", problem)
    return value, seconds


def _shown(value: str) -> str:
    """What a client has sent, in a message."""
    return ascii(value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "...")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(Code.INVALID_JSON, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(Code.INVALID_REQUEST, "the body must be a JSON object")
    return body


def _id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _ID_CHARS or not value.isprintable():
        raise invalid(where, "must be an id, as it was given")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _METADATA:
        raise invalid("metadata", f"must be an object with at most {_METADATA} keys")
    for name, text in value.items():
        if len(name) > _KEY_CHARS or name == KEY:
            raise invalid("metadata", f"takes keys of up to {_KEY_CHARS} characters, not {KEY}")
        if not isinstance(text, str) or len(text) > _VALUE_CHARS:
            raise invalid("metadata", f"takes texts of up to {_VALUE_CHARS} characters")
    return value


def _expiry(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.keys() != {"anchor", "seconds"}:
        raise invalid(where, "must have an anchor and seconds")
    return expiry_of(value["anchor"], value["seconds"], where)


def expiry_of(anchor: Any, seconds: Any, where: str) -> int:
    if anchor != "created_at":
        raise invalid(f"{where}.anchor", "must be created_at")
    low, high = _EXPIRES_S
    if type(seconds) is not int or not low <= seconds <= high:
        raise invalid(f"{where}.seconds", f"must be a number from {low} to {high}")
    return seconds


# The form of an upload.

FORM_FIELDS: Final = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


def file_name(given: str | None) -> str:
    """It is only a name: where a path is meant, somebody is mistaken, or tries something."""
    name = given or ""
    if not 0 < len(name) <= _NAME_CHARS or not name.isprintable():
        raise invalid("file", f"must have a printable name of at most {_NAME_CHARS} characters")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise invalid("file", "must have a name without a path")
    return name


def check_purpose(given: str | None) -> None:
    if given != Purpose.INPUT:
        problem = "is missing" if given is None else f"is {_shown(given)}"
        raise invalid("purpose", f"{problem}; the one that there is here is '{Purpose.INPUT}'")


def form_expiry(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = (fields.get(name) for name in FORM_FIELDS[1:])
    if anchor is None and seconds is None:
        return None
    number = int(seconds[:9]) if seconds and seconds.isascii() and seconds.isdigit() else None
    return expiry_of(anchor, number, "expires_after")
