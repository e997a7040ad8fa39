from __future__ import annotations

import itertools
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.sse import Events, ends_stream, payload, split_events
from backends.transcript import Blame, judge_answer, judge_event

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def native(text: str = "a", finish: Any = None) -> dict[str, Any]:
    return {"text": text, "output_ids": [1], "meta_info": {"id": "r", "finish_reason": finish}}


def chunk(text: str = "a", finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def abort(message: str, status: int | None) -> dict[str, Any]:
    return {"type": "abort", "message": message, "status_code": status, "err_type": None}


HARMLESS = (
    b": ping\n\n",
    DONE,
    event(native()),
    event(native(finish={"type": "length", "length": 0})),
    event(native('"error" "abort"', {"type": "stop", "matched": "abort"})),
    event(native("error")),
    event(chunk('{"error": {"message": "quoted"}}')),
    event(chunk("abort")),
    event(chunk("error", "stop")),
    event({"type": "response.created", "response": {"status": "in_progress", "error": None}}),
    event(chunk("response.failed")),
    b'data: not json with "error"\n\n',
)
FAILURES = (
    (event({"error": {"message": "The request queue is full.", "code": 503}}), 503),
    (event({"error": {"object": "error", "message": "x", "type": "BadRequest", "code": 400}}), 400),
    (event({"error": "Unauthorized"}), 500),
    (event(native(finish=abort("Decode transfer failed for request rank=0", 500))), 500),
    (event(native(finish=abort("Aborted", None))), 499),
    (event(chunk("", "abort")), 499),
    (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n', 503),
    (event({"type": "response.failed", "response": {"error": {"code": "x", "message": "y"}}}), 500),
)


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_only_looks_like_an_error_is_none(harmless: bytes) -> None:
    assert judge_event(harmless) is None


@pytest.mark.parametrize(("failure", "status"), FAILURES)
def test_an_error_in_a_stream_is_recognised(failure: bytes, status: int) -> None:
    trouble = judge_event(HARMLESS[2] + failure + DONE)

    assert trouble is not None
    assert trouble.status == status


@given(st.text(), st.sampled_from(["stop", "length", None]))
def test_no_text_that_a_model_writes_is_taken_for_an_error(text: str, finish: str | None) -> None:
    assert judge_event(event(chunk(text, finish)) + event(native(text))) is None
    assert judge_answer("chat", 200, orjson.dumps(chunk(text, finish))) is None


@given(
    st.lists(st.sampled_from(HARMLESS), max_size=5),
    st.sampled_from(FAILURES),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_an_error_is_found_wherever_the_stream_is_cut(
    before: list[bytes], failure: tuple[bytes, int], cuts: list[int]
) -> None:
    stream, events = b"".join(before) + failure[0] + DONE, Events()
    bounds = [0, *sorted(cut % len(stream) for cut in cuts), len(stream)]
    found = [judge_event(events.cut(stream[a:b])) for a, b in itertools.pairwise(bounds)]

    assert [trouble.status for trouble in found if trouble] == [failure[1]]


@pytest.mark.parametrize(
    ("status", "message", "blames", "retryable"),
    [
        (400, "The input (9 tokens) is longer than the context", Blame.REQUEST, False),
        (400, "Request 5 exceeds the maximum number of tokens: 9 > 8", Blame.REQUEST, False),
        (400, "Duplicate request ID detected: x", Blame.REQUEST, True),
        (401, "Unauthorized", Blame.PREFILL, False),
        (429, "slow down", Blame.PREFILL, True),
        (500, "Prefill bootstrap failed for request rank=0 timed out after", Blame.PAIR, True),
        (500, "Prefill transfer failed for request rank=0", Blame.PAIR, True),
        (500, "Decode handshake failed for request rank=0", Blame.PREFILL, True),
        (500, "Decode transfer failed for request rank=0", Blame.PAIR, True),
        (
            *(500, "Decode transfer failed. Lost connection with prefill instance (a:1)"),
            *(Blame.PREFILL, True),
        ),
        (500, "Metadata corruption detected - bootstrap_room mismatch", Blame.PAIR, True),
        (500, "aborted (bootstrap_room=0)", Blame.PAIR, True),
        (500, "KV checksum mismatch", Blame.PAIR, True),
        (500, "Out of memory even after retracting all other requests", Blame.DECODE, True),
        (503, "Retracted under decode memory pressure without a KV backup", Blame.DECODE, True),
        (503, "The request queue is full.", Blame.PREFILL, True),
        (503, "The request is aborted by a higher priority request.", Blame.ABORTED, True),
        (503, "Using priority is disabled", Blame.REQUEST, False),
        (500, "x follow_bootstrap_room conflict y", Blame.REQUEST, False),
        (502, "<html>bad gateway</html>", Blame.PREFILL, True),
    ],
)
def test_each_cause_has_its_culprit(
    status: int, message: str, blames: Blame, *, retryable: bool
) -> None:
    body = orjson.dumps({"object": "error", "message": message, "code": status})
    trouble = judge_answer("generate", status, body, leg=Blame.PREFILL)

    assert trouble is not None
    assert (trouble.blames, trouble.retryable) == (blames, retryable)
    assert (trouble.status, trouble.message) == (status, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"error":{"message":"bad","code":400}}', "bad"),
        (b'{"object":"error","message":"bad","code":400}', "bad"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b"<html>\xff</html>", "<html>\ufffd</html>"),
        (b'{"detail":[{"loc":1}]}', '{"detail":[{"loc":1}]}'),
        (b"", ""),
    ],
)
def test_the_message_is_found_in_any_shape(body: bytes, message: str) -> None:
    trouble = judge_answer("chat", 418, body)

    assert trouble is not None
    assert trouble.message == message


@pytest.mark.parametrize(
    ("dialect", "body", "status"),
    [
        ("generate", orjson.dumps(native(finish=abort("Abort in waiting queue", None))), 499),
        ("generate", orjson.dumps([native(), native(finish=abort("x", 503))]), 503),
        ("chat", orjson.dumps(chunk("a", "abort")), 499),
        ("generate", event(native(finish=abort("Prefill bootstrap failed", 500))) + DONE, 500),
        ("generate", event(native()), 502),
        ("generate", b'{"text": "cut', 502),
        ("chat", b"", 502),
        ("chat", b'{"error"}', 502),
    ],
)
def test_a_200_is_not_success(dialect: str, body: bytes, status: int) -> None:
    trouble = judge_answer(dialect, 200, body)

    assert trouble is not None
    assert trouble.status == status


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps(native(finish={"type": "stop", "matched": 2})),
        event(native(finish={"type": "length", "length": 0})) + DONE,
        event(native(finish={"type": "length", "length": 0})),
        event(native()) + DONE,
        b'{"object":"list","data":[]}\n',
    ],
)
def test_an_answer_that_is_whole_is_no_trouble(body: bytes) -> None:
    assert judge_answer("generate", 200, body) is None


@pytest.mark.parametrize(
    ("tail", "ends"),
    [
        (DONE, True),
        (event(chunk()) + DONE, True),
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
        (b'event: response.completed\ndata: {"type":"response.completed"}\n\n', True),
        (b"event: response.failed\ndata: {}\n\n", True),
        (b"event: response.incomplete\ndata: {}\n\n", True),
        (b"event: message_delta\ndata: {}\n\n", False),
        (event(chunk("data: [DONE]\n\n")), False),
        (event(chunk("event: message_stop\n")), False),
        (DONE[:-1], False),
        (b"", False),
    ],
)
def test_only_the_protocols_last_event_ends_a_stream(tail: bytes, *, ends: bool) -> None:
    assert ends_stream(tail) is ends


@given(st.lists(st.sampled_from(HARMLESS)), st.lists(st.integers(0, 10_000), max_size=8))
def test_events_come_out_whole_wherever_the_stream_is_cut(
    sent: list[bytes], cuts: list[int]
) -> None:
    stream, events = b"".join(sent), Events()
    bounds = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    out = [events.cut(stream[a:b]) for a, b in itertools.pairwise(bounds)]

    assert split_events(b"".join(out)) == sent
    assert all(piece == b"" or piece.endswith(b"\n\n") for piece in out)


@given(st.binary())
def test_no_bytes_break_the_judge(raw: bytes) -> None:
    assert payload(raw) is None or b"data: " in raw
    assert judge_event(b'data: {"error":' + raw) is None
    assert judge_answer("generate", 500, raw) is not None


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 999) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "meta_info", "choices", "finish_reason", "type", "code", "response"]
            ),
            inner | st.sampled_from(["abort", "response.failed"]),
        )
    ),
)


@given(values)
def test_no_shape_of_json_breaks_the_judge(value: Any) -> None:
    for status in (200, 500):
        trouble = judge_answer("generate", status, orjson.dumps(value))
        assert trouble is None or 400 <= trouble.status <= 599
    assert judge_event(event(value)) == judge_event(event(value))
