"""Which lines can run, and what is said of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batch.ingest import sliced
from gateway.batch.objects import NewRow, Problem
from gateway.batch.validate import MOST_PROBLEMS, Checker, Limits, reported
from tests.gateway.batch.served import ENDPOINT, jsonl, row


def checked(*pieces: bytes, **limits: int) -> Checker:
    checker = Checker(ENDPOINT, Limits(**limits))
    for piece in pieces:
        checker.feed(piece)
    checker.finish()
    return checker


def problems(*pieces: bytes, **limits: int) -> list[tuple[str, int | None]]:
    return [(one.code, one.line) for one in checked(*pieces, **limits).problems]


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def test_good_lines_become_rows_at_their_places() -> None:
    data = b"\xef\xbb\xbf" + jsonl(row(1)) + b"\r\n" + jsonl(row(2)).rstrip() + b"\r\n" + b"  "
    checker = checked(data)
    rows = list(checker.rows())
    assert [(one.number, one.custom_id) for one in rows] == [(1, "row-1"), (3, "row-2")]
    texts = [data[one.offset : one.offset + one.length] for one in rows]
    assert [orjson.loads(text)["custom_id"] for text in texts] == ["row-1", "row-2"]
    assert (checker.model, checker.total) == ("m", 2)


@given(st.lists(st.integers(1, 40)), st.sampled_from(["", "\n"]))
def test_it_does_not_matter_how_the_file_is_cut_into_pieces(cuts: Sequence[int], end: str) -> None:
    data = jsonl(row(1), {}, row(2), row(2), row(3)).rstrip() + end.encode()
    pieces, rest = [], data
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    whole, cut_up = checked(data), checked(*pieces, rest)
    assert whole.problems == cut_up.problems
    assert (
        checked(*pieces, rest, max_line_bytes=50).problems
        == checked(data, max_line_bytes=50).problems
    )


@given(st.lists(st.integers(0, 5_000), max_size=40))
def test_a_piece_is_checked_a_few_lines_at_a_time(lengths: Sequence[int]) -> None:
    piece = b"".join(b"x" * length + b"\n" for length in lengths)
    assert b"".join(sliced(piece)) == piece
    assert all(len(part) <= 32_768 for part in sliced(piece))


def test_where_lines_are_short_so_are_the_slices_of_a_piece() -> None:
    piece = (b"x" * 199 + b"\n") * 300
    assert max(part.count(b"\n") for part in sliced(piece)) <= 17


BAD_LINES: list[tuple[str, bytes, str]] = [
    ("no JSON", b"{nonsense}", "invalid_json_line"),
    ("no object", b"[1, 2]", "invalid_json_line"),
    ("no UTF-8", b'{"custom_id": "\xff"}', "invalid_encoding"),
    ("no custom_id", jsonl({k: v for k, v in row(9).items() if k != "custom_id"}),
     "missing_required_parameter"),
    ("a custom_id that is no text", jsonl(row(9, custom_id=9)), "invalid_request"),
    ("an empty custom_id", jsonl(row(9, custom_id="")), "invalid_request"),
    ("a NUL in custom_id", jsonl(row(9, custom_id="a\x00b")), "invalid_request"),
    ("a long custom_id", jsonl(row(9, custom_id="x" * 513)), "invalid_request"),
    ("an earlier custom_id", jsonl(row(1)), "duplicate_custom_id"),
    ("another method", jsonl(row(9, method="GET")), "invalid_method"),
    ("another url", jsonl(row(9, url="/v1/embeddings")), "url_mismatch"),
    ("a body that is no object", jsonl(row(9, body="x")), "invalid_request"),
    ("no model", jsonl(row(9, body={})), "missing_required_parameter"),
    ("a model that is no text", jsonl(row(9, body={"model": 3})), "invalid_request"),
    ("another model", jsonl(row(9, body={"model": "n"})), "model_mismatch"),
    ("a stream", jsonl(row(9, body=body("x", stream=True))), "invalid_request"),
    ("an unknown field", jsonl(row(9, priority=1)), "unknown_parameter"),
    ("deep nesting", jsonl(row(9)).replace(b'"Say 9"', b"[" * 600 + b"]" * 600),
     "invalid_request"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "code"),
    [(line, code) for _, line, code in BAD_LINES],
    ids=[n for n, _, _ in BAD_LINES],
)
def test_a_bad_line_is_told_by_its_number(line: bytes, code: str) -> None:
    data = jsonl(row(1)) + line.rstrip(b"\n") + b"\n" + jsonl(row(3))
    assert problems(data) == [(code, 2)]


def test_all_bad_lines_are_told_and_not_only_the_first() -> None:
    data = jsonl(row(1)) + b"x\n" + jsonl(row(2), row(1), row(4, url="/v1/files")) + b"\n{}\n"
    assert problems(data) == [
        ("invalid_json_line", 2),
        ("duplicate_custom_id", 4),
        ("url_mismatch", 5),
        ("missing_required_parameter", 7),
    ]


def test_too_many_requests_are_too_many_whatever_the_lines_after_them_hold() -> None:
    data = jsonl(row(1), row(2), row(3)) + b"nonsense\n"
    assert problems(data, max_rows=3) == [("too_many_tasks", None)]
    assert problems(data[:-9], max_rows=3) == []


def test_51_000_lines_are_refused() -> None:
    line = jsonl(row(12345))
    lines = (line.replace(b"12345", b"%d" % number) for number in range(51_000))
    assert problems(b"".join(lines)) == [("too_many_tasks", None)]


def test_a_file_without_requests_is_empty() -> None:
    assert problems(b"") == problems(b"\n \n\n") == [("empty_batch", None)]


def test_a_line_that_is_too_long_is_not_kept_and_those_after_it_are_where_they_are() -> None:
    data = jsonl(row(1, custom_id="x" * 400), row(2))
    assert problems(data, max_line_bytes=200) == [("invalid_request", 1)]
    lone = b" " * 10_000 + b"\n" + jsonl(row(2))
    rows = list(checked(*(lone[n : n + 7] for n in range(0, len(lone), 7))).rows())
    assert (rows[0].number, rows[0].offset) == (2, 10_001)


def test_prompts_that_begin_alike_are_neighbours_in_the_order_of_the_first() -> None:
    common = "You are a careful clerk. " * 20
    texts = [common + "one", "alone", common + "two", "lonely", common + "three"]
    data = jsonl(*(row(n, body=body(text)) for n, text in enumerate(texts)))
    rows = sorted(checked(data).rows(), key=lambda one: one.rank)
    assert [one.number for one in rows] == [1, 3, 5, 2, 4]


def test_prompts_that_differ_keep_the_order_of_the_file() -> None:
    data = jsonl(*(row(n) for n in range(50)))
    assert [one.rank for one in checked(data).rows()] == list(range(50))


@given(st.lists(st.text(max_size=5), max_size=30))
def test_ranks_are_a_permutation(texts: list[str]) -> None:
    data = jsonl(row(0), *(row(n + 1, body=body(text)) for n, text in enumerate(texts)))
    rows: list[NewRow] = list(checked(data).rows())
    assert sorted(one.rank for one in rows) == list(range(len(texts) + 1))


def test_every_line_is_told_even_where_there_are_thousands() -> None:
    lines = [*range(1, MOST_PROBLEMS + 1), 500, 501, 502, 900]
    many = [Problem(code="invalid_json_line", message="bad", line=line) for line in lines]
    told = reported(many)
    assert len(told) == MOST_PROBLEMS + 1
    assert told[-1].message == "so are 4 more lines: 500-502, 900"
