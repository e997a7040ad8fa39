"""What a client is told when its request cannot be served: one code each, in its own protocol."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, Final

import orjson

MESSAGE_CHARS: Final = 1_000


class Dialect(StrEnum):
    """The protocols that requests and answers are written in."""

    GENERATE = "generate"
    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"


class Code(StrEnum):
    """Stable names: clients and dashboards match on them, so none is ever renamed."""

    MALFORMED_HTTP = "malformed_http"
    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED = "unsupported"
    UNKNOWN_CLASS = "unknown_class"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    DUPLICATE_RID = "duplicate_rid"
    UNKNOWN_PARAMETER = "unknown_parameter"
    WORKER_EXISTS = "worker_exists"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    NEEDS_UNIFIED_SERVER = "needs_unified_server"
    UNKNOWN_MODEL = "unknown_model"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    FILE_IN_USE = "file_in_use"
    BATCH_HAS_ENDED = "batch_has_ended"
    BODY_TOO_LARGE = "body_too_large"
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable"
    QUEUE_FULL = "queue_full"
    QUOTA_EXCEEDED = "quota_exceeded"
    REQUEST_CANCELLED = "request_cancelled"
    INTERNAL = "internal_error"
    UPSTREAM_FAILED = "upstream_failed"
    UPSTREAM_REJECTED = "upstream_rejected"
    STREAM_INTERRUPTED = "stream_interrupted"
    DEADLINE_HOPELESS = "deadline_hopeless"
    DEADLINE_PASSED = "deadline_passed"
    NO_WORKER = "no_worker"
    WORKERS_UNAVAILABLE = "workers_unavailable"
    UPSTREAM_OVERLOADED = "upstream_overloaded"
    GATEWAY_DRAINING = "gateway_draining"
    UPSTREAM_TIMEOUT = "upstream_timeout"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    STORAGE_FULL = "storage_full"


STATUS: Final[dict[Code, int]] = {
    Code.MALFORMED_HTTP: 400,
    Code.INVALID_JSON: 400,
    Code.INVALID_REQUEST: 400,
    Code.UNSUPPORTED: 400,
    Code.UNKNOWN_CLASS: 400,
    Code.CONTEXT_LENGTH_EXCEEDED: 400,
    Code.DUPLICATE_RID: 400,
    Code.UNKNOWN_PARAMETER: 400,
    Code.UPSTREAM_REJECTED: 400,
    Code.UNAUTHORIZED: 401,
    Code.NOT_FOUND: 404,
    Code.NEEDS_UNIFIED_SERVER: 404,
    Code.UNKNOWN_MODEL: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.REQUEST_TIMEOUT: 408,
    Code.WORKER_EXISTS: 409,
    Code.FILE_IN_USE: 409,
    Code.BATCH_HAS_ENDED: 409,
    Code.BODY_TOO_LARGE: 413,
    Code.RANGE_NOT_SATISFIABLE: 416,
    Code.QUEUE_FULL: 429,
    Code.QUOTA_EXCEEDED: 429,
    Code.REQUEST_CANCELLED: 499,
    Code.INTERNAL: 500,
    Code.UPSTREAM_FAILED: 502,
    Code.STREAM_INTERRUPTED: 502,
    Code.DEADLINE_HOPELESS: 503,
    Code.DEADLINE_PASSED: 503,
    Code.NO_WORKER: 503,
    Code.WORKERS_UNAVAILABLE: 503,
    Code.UPSTREAM_OVERLOADED: 503,
    Code.GATEWAY_DRAINING: 503,
    Code.STORAGE_UNAVAILABLE: 503,
    Code.UPSTREAM_TIMEOUT: 504,
    Code.STORAGE_FULL: 507,
}

_OPENAI_TYPES: Final = {
    401: "authentication_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_TYPES: Final = _OPENAI_TYPES | {
    404: "not_found_error",
    413: "request_too_large",
    504: "timeout_error",
}


class ApiError(Exception):
    """Ends a request; an upstream's own refusal keeps its status, all others take the table's."""

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = STATUS[code] if status is None else status
        self.message = sanitised(message)
        self.param = None if param is None else sanitised(param)
        self.retry_after_s = retry_after_s if self.retryable else None
        """When to come again; never said of what would be refused again."""

    @property
    def retryable(self) -> bool:
        return self.status in (408, 429) or self.status >= 500


def invalid(param: str, problem: str) -> ApiError:
    return ApiError(Code.INVALID_REQUEST, f"{param} {problem}", param=param)


def sanitised(text: str) -> str:
    """One printable line of bounded length: messages may quote what strangers sent."""
    text = text[: MESSAGE_CHARS + 1]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 3] + "..."


def error_type(status: int, *, types: dict[int, str] = _OPENAI_TYPES) -> str:
    return types.get(status) or ("invalid_request_error" if status < 500 else "api_error")


def _openai(error: ApiError) -> dict[str, Any]:
    fields = {
        "message": error.message,
        "type": error_type(error.status),
        "param": error.param,
        "code": error.code,
    }
    return {"error": fields}


def _anthropic(error: ApiError) -> dict[str, Any]:
    kind = error_type(error.status, types=_ANTHROPIC_TYPES)
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message, "code": error.code},
    }


def _native(error: ApiError) -> dict[str, Any]:
    """SGLang's own fields, so that its clients see `retryable` where they look for it."""
    body = _openai(error)
    body["error"] |= {"status": error.status, "retryable": error.retryable}
    return body


_BODIES: Final[dict[Dialect, Callable[[ApiError], dict[str, Any]]]] = {
    Dialect.GENERATE: _native,
    Dialect.MESSAGES: _anthropic,
}


def error_body(dialect: Dialect, error: ApiError, *, request_id: str = "") -> bytes:
    """The JSON body of an answer whose status is still open."""
    body = _BODIES.get(dialect, _openai)(error)
    if dialect is Dialect.MESSAGES and request_id:
        body["request_id"] = sanitised(request_id)
    return orjson.dumps(body)


def error_event(dialect: Dialect, error: ApiError, *, sequence: int = 0) -> bytes:
    """The events that end a stream that has begun; a client must not take it for complete."""
    match dialect:
        case Dialect.MESSAGES:
            return b"event: error\ndata: " + error_body(dialect, error) + b"\n\n"
        case Dialect.RESPONSES:
            return b"event: error\ndata: " + _responses_error(error, sequence) + b"\n\n"
        case Dialect.GENERATE | Dialect.CHAT | Dialect.COMPLETIONS | Dialect.EMBEDDINGS:
            return b"data: " + error_body(dialect, error) + b"\n\ndata: [DONE]\n\n"


def _responses_error(error: ApiError, sequence: int) -> bytes:
    """The documented event has flat fields; the official client raises on the nested ones."""
    event = _openai(error) | {
        "type": "error",
        "code": error.code,
        "message": error.message,
        "param": error.param,
        "sequence_number": sequence,
    }
    return orjson.dumps(event)
