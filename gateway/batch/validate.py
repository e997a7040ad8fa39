"""Whether a file can run as a batch: every line that cannot is found, and said by its number."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import orjson

from gateway.batch.objects import NewRow, Problem

CUSTOM_ID_CHARS: Final = 512
MODEL_CHARS: Final = 512
MOST_PROBLEMS: Final = 200
"""Told one by one; of those after them it is only said which lines they are on."""

_BOM: Final = b"\xef\xbb\xbf"
_FIELDS: Final = ("custom_id", "method", "url", "body")
_BRACKETS: Final = 250
"""orjson reads deeper nesting than it writes."""
_HEADS: Final = (256, 1_024, 4_096)
"""Prompts that have so many letters in common become neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_rows: int = 50_000
    max_line_bytes: int = 64 * 1_048_576


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    offset: int
    text: bytes
    """Without its end."""
    is_too_long: bool = False


class Splitter:
    """A file that comes in pieces, as lines; of one that is too long only the beginning is kept."""

    def __init__(self, max_line_bytes: int) -> None:
        self._most = max_line_bytes
        self._number = 0
        self._offset = 0
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._seen_bytes = 0

    def feed(self, piece: bytes) -> Iterator[Line]:
        first, *more = piece.split(b"\n")
        self._keep(first)
        for text in more:
            yield self._cut(1)
            self._keep(text)

    def finish(self) -> Iterator[Line]:
        """The last line may lack its end."""
        if self._seen_bytes:
            yield self._cut(0)

    def _keep(self, text: bytes) -> None:
        self._seen_bytes += len(text)
        if self._kept_bytes <= self._most and text:
            self._kept.append(text)
            self._kept_bytes += len(text)

    def _cut(self, end: int) -> Line:
        text, offset = b"".join(self._kept), self._offset
        is_too_long = self._seen_bytes > self._most
        self._offset += self._seen_bytes + end
        self._number += 1
        self._kept, self._kept_bytes, self._seen_bytes = [], 0, 0
        if self._number == 1 and text.startswith(_BOM):
            text, offset = text[len(_BOM) :], len(_BOM)
        return Line(self._number, offset, text.removesuffix(b"\r"), is_too_long)


class _Bad(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class Checker:
    """Takes a file piece by piece; what it keeps of a line is its custom_id and a few numbers."""

    def __init__(self, endpoint: str, limits: Limits) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._splitter = Splitter(limits.max_line_bytes)
        self._requests = 0
        self._ids: dict[str, int] = {}
        self._places: list[tuple[int, int, int]] = []
        self._order = _Order()
        self.model = ""
        self.problems: list[Problem] = []

    def feed(self, piece: bytes) -> None:
        for line in self._splitter.feed(piece):
            self._take(line)

    def finish(self) -> None:
        """That was the whole file."""
        for line in self._splitter.finish():
            self._take(line)
        if self._requests > self._limits.max_rows:
            message = f"the file has more than {self._limits.max_rows} requests"
            self.problems.insert(0, Problem(code="too_many_tasks", message=message))
        elif not self._requests:
            self.problems.append(Problem(code="empty_batch", message="the file has no requests"))

    @property
    def total(self) -> int:
        return self._requests

    def rows(self) -> Iterator[NewRow]:
        """The lines of a file without problems, by number; they are ordered before it returns."""
        return self._ranked(self._order.ranks())

    def _ranked(self, ranks: Sequence[int]) -> Iterator[NewRow]:
        for name, place, rank in zip(self._ids, self._places, ranks, strict=True):
            number, offset, length = place
            yield NewRow(number=number, custom_id=name, offset=offset, length=length, rank=rank)

    def _take(self, line: Line) -> None:
        if not line.text.strip():
            return
        self._requests += 1
        if self._requests > self._limits.max_rows:
            return
        try:
            body = self._checked(line)
        except _Bad as bad:
            problem = Problem(code=bad.code, message=str(bad), line=line.number, param=bad.param)
            self.problems.append(problem)
            return
        if not self.problems:
            self._places.append((line.number, line.offset, len(line.text)))
            self._order.add(body)

    def _checked(self, line: Line) -> dict[str, Any]:
        if line.is_too_long:
            most = self._limits.max_line_bytes
            raise _Bad("invalid_request", f"the line is longer than {most} bytes")
        request = _parsed(line.text)
        self._check_id(request["custom_id"], line.number)
        if request["method"] != "POST":
            raise _Bad("invalid_method", "method must be POST", "method")
        if request["url"] != self._endpoint:
            message = f"url must be {self._endpoint}, the endpoint of the batch"
            raise _Bad("url_mismatch", message, "url")
        return self._checked_body(request["body"])

    def _check_id(self, name: Any, number: int) -> None:
        if type(name) is not str or not 0 < len(name) <= CUSTOM_ID_CHARS or not name.isprintable():
            message = f"custom_id must be printable, of 1 to {CUSTOM_ID_CHARS} characters"
            raise _Bad("invalid_request", message, "custom_id")
        if (first := self._ids.setdefault(name, number)) != number:
            message = f"custom_id is that of line {first}, too"
            raise _Bad("duplicate_custom_id", message, "custom_id")

    def _checked_body(self, body: Any) -> dict[str, Any]:
        if type(body) is not dict:
            raise _Bad("invalid_request", "body must be an object", "body")
        model = body.get("model")
        if model is None:
            raise _Bad("missing_required_parameter", "body.model is missing", "body.model")
        if type(model) is not str or not 0 < len(model) <= MODEL_CHARS or not model.isprintable():
            raise _Bad("invalid_request", "body.model must be the name of a model", "body.model")
        self.model = self.model or model
        if model != self.model:
            message = f"one batch has one model, and that of the lines before is {self.model}"
            raise _Bad("model_mismatch", message, "body.model")
        if body.get("stream"):
            raise _Bad("invalid_request", "a batch has no streams: leave it out", "body.stream")
        return body


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        request = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _unreadable(text, error) from None
    if type(request) is not dict:
        raise _Bad("invalid_json_line", "the line is not a JSON object")
    if text.count(b"[") + text.count(b"{") > _BRACKETS:
        _check_depth(request)
    if missing := [name for name in _FIELDS if name not in request]:
        name = missing[0]
        raise _Bad("missing_required_parameter", f"{name} is missing", name)
    if len(request) > len(_FIELDS):
        name = min(request.keys() - set(_FIELDS))
        shown = name if name.isprintable() else ascii(name)
        raise _Bad("unknown_parameter", f"there is no parameter {shown[:100]}", shown[:100])
    return request


def _unreadable(text: bytes, error: orjson.JSONDecodeError) -> _Bad:
    try:
        text.decode()
    except UnicodeDecodeError as wrong:
        return _Bad("invalid_encoding", f"the line is not UTF-8 at its byte {wrong.start + 1}")
    return _Bad("invalid_json_line", f"the line is not valid JSON: {error}")


def _check_depth(request: dict[str, Any]) -> None:
    try:
        orjson.dumps(request)
    except orjson.JSONEncodeError:
        raise _Bad("invalid_request", "the line is nested too deeply") from None


class _Order:
    """Prompts that begin alike go one after the other, in the order in which the first came."""

    def __init__(self) -> None:
        self._firsts: tuple[dict[int, int], ...] = tuple({} for _ in _HEADS)
        self._keys: list[int] = []

    def add(self, body: dict[str, Any]) -> None:
        index, key = len(self._keys), 0
        text = _beginning(body).encode(errors="replace")
        for chars, firsts in zip(_HEADS, self._firsts, strict=True):
            key = key << 32 | firsts.setdefault(zlib.crc32(text[:chars]), index)
        self._keys.append(key)

    def ranks(self) -> list[int]:
        ranks = [0] * len(self._keys)
        for rank, index in enumerate(sorted(range(len(ranks)), key=self._keys.__getitem__)):
            ranks[index] = rank
        return ranks


def _beginning(body: dict[str, Any]) -> str:
    """Enough of the prompt to see what it has in common with others."""
    parts: list[str] = []
    room = _HEADS[-1]
    for text in _texts(body):
        parts.append(text[:room])
        room -= len(parts[-1])
        if room <= 0:
            break
    return "".join(parts)


def _texts(body: dict[str, Any]) -> Iterator[str]:
    for name in ("instructions", "messages", "prompt", "input"):
        value = body.get(name)
        for item in value if type(value) is list else (value,):
            if type(item) is str:
                yield item
            elif type(item) is dict:
                content = item.get("content")
                yield content if type(content) is str else str(content)[: _HEADS[-1]]


def reported(problems: Sequence[Problem]) -> list[Problem]:
    """All of them, in bounded space: the later ones only by their lines, for each kind."""
    told, rest = list(problems[:MOST_PROBLEMS]), problems[MOST_PROBLEMS:]
    by_code: dict[str, list[int]] = {}
    for problem in rest:
        by_code.setdefault(problem.code, []).append(problem.line or 0)
    for code, lines in by_code.items():
        message = f"so are {len(lines)} more lines: {_spans(lines)}"
        told.append(Problem(code=code, message=message, line=lines[0]))
    return told


def _spans(lines: Sequence[int]) -> str:
    spans = []
    for _, run in groupby(enumerate(lines), key=lambda pair: pair[1] - pair[0]):
        numbers = [line for _, line in run]
        last = "" if len(numbers) == 1 else f"-{numbers[-1]}"
        spans.append(f"{numbers[0]}{last}")
    return ", ".join(spans)
