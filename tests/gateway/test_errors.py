from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import (
    MESSAGE_CHARS,
    STATUS,
    ApiError,
    Code,
    Dialect,
    error_body,
    error_event,
    sanitised,
)

codes = st.sampled_from(Code)
dialects = st.sampled_from(Dialect)


def data_lines(events: bytes) -> list[bytes]:
    return [line[6:] for line in events.split(b"\n") if line.startswith(b"data: ")]


def code_in(value: dict[str, Any]) -> str:
    return str(value["error"]["code"])


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(Code)
    assert all(400 <= status <= 599 for status in STATUS.values())


@pytest.mark.parametrize("dialect", Dialect)
@pytest.mark.parametrize("code", Code)
def test_every_code_reaches_the_client_in_every_protocol(dialect: Dialect, code: Code) -> None:
    error = ApiError(code, 'a "quoted" reason', param="n")

    assert code_in(orjson.loads(error_body(dialect, error))) == code
    assert code_in(orjson.loads(data_lines(error_event(dialect, error))[0])) == code


@given(dialects, codes, st.text())
def test_no_message_breaks_out_of_its_event(dialect: Dialect, code: Code, message: str) -> None:
    lines = error_event(dialect, ApiError(code, message, param=message)).split(b"\n")

    assert all(line == b"" or line.startswith((b"data: ", b"event: ")) for line in lines)
    assert all(line == b"[DONE]" or orjson.loads(line) for line in data_lines(b"\n".join(lines)))


@given(st.text(st.characters(), max_size=3 * MESSAGE_CHARS))
def test_messages_are_one_printable_bounded_line(text: str) -> None:
    clean = sanitised(text)

    assert clean.isprintable()
    assert len(clean) == min(len(text), MESSAGE_CHARS)


def test_surrogates_from_headers_can_be_written_as_json() -> None:
    error = ApiError(Code.NOT_FOUND, "no route \udcff\r\nx-evil: 1")

    assert "no route    x-evil: 1" in error_body(Dialect.CHAT, error).decode()


def test_openai_shape() -> None:
    error = ApiError(Code.QUEUE_FULL, "too many wait", retry_after_s=2)

    assert orjson.loads(error_body(Dialect.CHAT, error)) == {
        "error": {
            "message": "too many wait",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
    }
    assert (error.status, error.retry_after_s) == (429, 2)


def test_anthropic_shape_carries_the_request_id() -> None:
    body = error_body(Dialect.MESSAGES, ApiError(Code.NO_WORKER, "none"), request_id="req-1")

    assert orjson.loads(body) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "none", "code": "no_worker"},
        "request_id": "req-1",
    }


def test_native_shape_says_whether_to_try_again() -> None:
    body = orjson.loads(error_body(Dialect.GENERATE, ApiError(Code.UPSTREAM_FAILED, "died")))

    assert body["error"]["retryable"] is True
    assert (body["error"]["status"], body["error"]["type"]) == (502, "api_error")


@pytest.mark.parametrize(
    "dialect", [Dialect.GENERATE, Dialect.CHAT, Dialect.COMPLETIONS, Dialect.EMBEDDINGS]
)
def test_openai_and_native_streams_end_with_done(dialect: Dialect) -> None:
    events = error_event(dialect, ApiError(Code.STREAM_INTERRUPTED, "died"))

    assert events.startswith(b'data: {"error":{')
    assert events.endswith(b"}}\n\ndata: [DONE]\n\n")


def test_responses_streams_end_with_the_documented_error_event() -> None:
    error = ApiError(Code.STREAM_INTERRUPTED, "died", param="input")
    event = error_event(Dialect.RESPONSES, error, sequence=7)

    assert event.startswith(b"event: error\ndata: ")
    assert orjson.loads(data_lines(event)[0]) | {"error": None} == {
        "type": "error",
        "code": "stream_interrupted",
        "message": "died",
        "param": "input",
        "sequence_number": 7,
        "error": None,
    }


def test_anthropic_streams_end_with_an_error_event_alone() -> None:
    event = error_event(Dialect.MESSAGES, ApiError(Code.UPSTREAM_TIMEOUT, "silent"))

    assert event.startswith(b"event: error\ndata: {")
    assert event.count(b"\n\n") == 1


def test_an_upstreams_refusal_keeps_its_status() -> None:
    error = ApiError(Code.UPSTREAM_REJECTED, "too odd", status=422)

    assert (error.status, error.retryable) == (422, False)
    assert b"invalid_request_error" in error_body(Dialect.CHAT, error)
