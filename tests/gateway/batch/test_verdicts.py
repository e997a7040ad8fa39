"""What becomes of a row after one try, and how many rows are taken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batch.attempts import Answered, Later
from gateway.batch.objects import Batch, Counts, Result, Row, Status, Usage
from gateway.batch.pace import Pace, PaceRule
from gateway.batch.progress import progress_of
from gateway.batch.verdicts import Again, usage_of, verdict
from gateway.errors import Code

SECOND = 1_000_000


def row(**more: Any) -> Row:
    facts: dict[str, Any] = {
        "batch": 1,
        "batch_id": "batch_1",
        "tenant": "a",
        "endpoint": "/v1/chat/completions",
        "number": 1,
        "custom_id": "mine",
        "blob": "b",
        "offset": 0,
        "length": 1,
        "fence": 1,
        "attempts": 0,
        "deadline_us": 10**15,
    }
    return Row(**facts | more)


def told(outcome: Answered | Later, *, is_last: bool = False, **more: Any) -> Result | Again:
    return verdict(row(**more), outcome, "request-1", is_last=is_last)


@pytest.mark.parametrize(("status", "failed"), [(200, False), (400, True), (404, True)])
def test_an_answer_is_the_rows_line(status: int, *, failed: bool) -> None:
    result = told(Answered(status=status, body=b'{"a": 1}'))
    assert isinstance(result, Result)
    line = json.loads(result.line)
    assert result.failed is failed
    assert (line["custom_id"], line["error"]) == ("mine", None)
    assert line["response"] == {"status_code": status, "request_id": "request-1", "body": {"a": 1}}


@pytest.mark.parametrize("code", [Code.WORKERS_UNAVAILABLE, Code.QUEUE_FULL, Code.DEADLINE_PASSED])
def test_the_fleets_trouble_is_nobodys_fault(code: Code) -> None:
    assert told(Later(code=code, message="")) == Again(pause_us=0, blameless=True)


def test_a_rows_own_trouble_waits_longer_each_time() -> None:
    later = Later(code=Code.UPSTREAM_FAILED, message="it died")
    pauses = [told(later, attempts=n) for n in (0, 1, 2, 100)]
    assert [it.pause_us // SECOND for it in pauses if isinstance(it, Again)] == [1, 2, 4, 300]
    assert not any(it.blameless for it in pauses if isinstance(it, Again))


def test_rows_that_ended_together_do_not_all_come_back_together() -> None:
    later = Later(code=Code.UPSTREAM_FAILED, message="it died")
    pauses = [told(later, attempts=9, number=number) for number in range(1, 9)]
    found = [it.pause_us // SECOND for it in pauses if isinstance(it, Again)]
    assert found == [300, 375, 450, 525] * 2


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v2/of-a-newer-gateway"])
def test_a_server_that_fails_a_row_for_ever_has_the_last_word(endpoint: str) -> None:
    later = Later(code=Code.UPSTREAM_FAILED, message="no such kernel", is_engines=True)
    assert isinstance(told(later, endpoint=endpoint), Again)
    result = told(later, is_last=True, endpoint=endpoint)
    assert isinstance(result, Result)
    assert result.failed
    response = json.loads(result.line)["response"]
    assert response["status_code"] == 502
    assert response["body"]["error"]["message"] == "no such kernel"


USAGES: dict[str, dict[str, Any]] = {
    "chat": {
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
    },
    "responses": {
        "usage": {
            "input_tokens": 5,
            "output_tokens": 7,
            "input_tokens_details": {"cached_tokens": 3},
        }
    },
    "generate": {
        "meta_info": {"prompt_tokens": 5, "completion_tokens": 7, "cached_tokens": 3},
    },
}


@pytest.mark.parametrize("answer", USAGES.values(), ids=USAGES)
def test_tokens_are_read_from_every_protocols_answer(answer: dict[str, Any]) -> None:
    assert usage_of(json.dumps(answer).encode()) == (5, 7, 3)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"usage": null}', b'{"usage": {"x": 1}}'])
def test_an_answer_that_tells_no_tokens_has_none(body: bytes) -> None:
    assert usage_of(body) == (0, 0, 0)


# Pace.

RULE = PaceRule(least_ahead=16, most_held=1000)


def test_a_fleet_that_takes_all_is_given_twice_as_much_each_time() -> None:
    pace, rooms = Pace(RULE), list[int]()
    for now_us in range(5):
        rooms.append(pace.room(held=sum(rooms), waiting=0, now_us=now_us))
        pace.took(rooms[-1])
    assert rooms == [16, 32, 64, 128, 256]


def test_a_full_fleet_is_given_nothing_beyond_what_waits() -> None:
    pace = Pace(RULE)
    pace.took(pace.room(held=0, waiting=0, now_us=0))
    assert pace.room(held=16, waiting=16, now_us=1) == 0


def test_while_nobody_can_answer_few_are_tried_and_ever_more_rarely() -> None:
    pace, now_us, tries = Pace(RULE), 0, 0
    while now_us < 600 * SECOND:
        if pace.room(held=0, waiting=0, now_us=now_us):
            tries += 1
            pace.took(16)
            pace.refused(now_us)
        now_us += SECOND // 10
    assert 50 < tries < 80
    pace.answered()
    assert pace.room(held=0, waiting=0, now_us=now_us) >= 16


@given(
    st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 2000), st.sampled_from("ra-")), max_size=50
    )
)
def test_no_more_is_ever_held_than_there_is_memory_for(steps: list[tuple[int, int, str]]) -> None:
    pace = Pace(RULE)
    for now, (held, waiting, what) in enumerate(steps):
        room = pace.room(held=held, waiting=waiting, now_us=now * SECOND)
        assert room >= 0
        assert room == 0 or held + room <= RULE.most_held
        pace.took(room)
        if what == "r":
            pace.refused(now * SECOND)
        elif what == "a":
            pace.answered()


# Progress.


def batch(**more: Any) -> Batch:
    facts: dict[str, Any] = {
        "seq": 1,
        "id": "batch_1",
        "tenant": "a",
        "endpoint": "/v1/completions",
        "window": "24h",
        "input_file_id": "f",
        "input_blob": "b",
        "status": Status.IN_PROGRESS,
        "created_us": 0,
        "deadline_us": 10**15,
        "counts": Counts(total=100, completed=20),
        "claimed": 10,
        "usage": Usage(generated_tokens=500),
        "recent_us": 90 * SECOND,
        "recent_rows": 20,
        "recent_tokens": 500,
    }
    return Batch(**facts | more)


def test_the_finish_is_as_far_as_the_last_minute_lets_one_see() -> None:
    progress = progress_of(batch(), 100 * SECOND)
    assert (progress.rows_per_s, progress.tokens_per_s) == (2.0, 50.0)
    assert (progress.queued, progress.running) == (70, 10)
    assert progress.finish_at == 100 + 40


@pytest.mark.parametrize(
    "more", [{"recent_rows": 0, "recent_tokens": 0}, {"status": Status.COMPLETED}]
)
def test_nobody_guesses_a_finish_that_nothing_points_at(more: dict[str, Any]) -> None:
    assert progress_of(batch(**more), 100 * SECOND).finish_at is None


def test_progress_fits_a_metadata_value() -> None:
    large = batch(counts=Counts(total=50_000, completed=49_999), usage=Usage(prompt_tokens=10**12))
    assert len(progress_of(large, 10**15).as_text()) < 512
