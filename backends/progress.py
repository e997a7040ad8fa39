"""How far an answer has come, as its own stream tells it: tokens, text, and what is settled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final


class Kind(StrEnum):
    """What an event of the stream holds: everything so far, or what is new."""

    CUMULATIVE = "generate-cumulative"
    INCREMENTAL = "generate-incremental"
    COMPLETIONS = "completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    kind: Kind
    output_ids: list[int]
    text: str
    prompt_tokens: int
    cached_tokens: int
    finish_reason: dict[str, Any] | str | None
    last_meta: dict[str, Any]
    """SGLang's `meta_info`; for completions the chunk's own fields, such as id and created."""
    error: dict[str, Any] | None
    settled_tokens: int
    """The tokens whose text is out: a server holds back half a character and half a stop string."""
    settled_chars: int
    shown_tokens: int
    """What the client has been sent: after `settled`, more than is kept."""
    shown_chars: int

    def settled(self) -> Progress:
        """Where to go on from so that no character is lost at the seam; the few tokens after it
        are made once more, and the client is not shown them twice."""
        return replace(
            self,
            output_ids=self.output_ids[: self.settled_tokens],
            text=self.text[: self.settled_chars],
        )


def kind_of(first: dict[str, Any], second: dict[str, Any]) -> Kind | None:
    """Told by whether the second event holds as many ids as were made by then, or as since the
    first; None while the first had none, so that both are equal."""
    if "choices" in first:
        return Kind.COMPLETIONS
    ids = second.get("output_ids") or []
    before, now = _made(first), _made(second)
    if before == 0:
        return None
    cumulative = abs(len(ids) - now) <= abs(len(ids) - (now - before))
    return Kind.CUMULATIVE if cumulative else Kind.INCREMENTAL


def _made(event: dict[str, Any]) -> int:
    return count_of(meta_of(event), "completion_tokens") or len(event.get("output_ids") or [])


def count_of(fields: Any, name: str) -> int:
    count = fields.get(name) if type(fields) is dict else None
    return count if type(count) is int else 0


def meta_of(event: dict[str, Any]) -> dict[str, Any]:
    meta = event.get("meta_info")
    return meta if type(meta) is dict else {}


def choice_of(chunk: dict[str, Any]) -> dict[str, Any] | None:
    choices = chunk.get("choices")
    return choices[0] if type(choices) is list and choices and type(choices[0]) is dict else None


def is_native(event: dict[str, Any]) -> bool:
    """An event of /generate that carries an answer, well formed enough to be read."""
    return type(event.get("output_ids")) is list and type(event.get("text", "")) is str


def carries_tokens(event: dict[str, Any]) -> bool:
    return is_native(event) or choice_of(event) is not None


def choice_parts(choice: dict[str, Any]) -> tuple[list[int], str]:
    """The ids and the text of one completion chunk."""
    ids, text = choice.get("token_ids"), choice.get("text")
    return ids if type(ids) is list else [], text if type(text) is str else ""


def error_of(event: dict[str, Any]) -> dict[str, Any] | None:
    if not (error := event.get("error")):
        return None
    return error if type(error) is dict else {"message": error}


WATCHED_EVENTS: Final = 64


@dataclass(frozen=True, slots=True)
class _Mark:
    tokens: int
    chars: int
    grew: bool


class Settling:
    """Finds the last event after which the server held nothing back.

    Half a character shows as tokens without text, or as a text that stops at a space: servers
    print up to the last space before it. Half a stop string may hide behind any text, and is
    ruled out only when the next text does not begin as a stop string does.
    """

    __slots__ = ("_marks", "_starts")

    def __init__(self, stops: tuple[str, ...] = (), *, from_start: bool = True) -> None:
        self._starts = tuple(stop[0] for stop in stops if stop)
        self._marks = [_Mark(0, 0, grew=True)] if from_start else []

    def note(self, tokens: int, chars: int, fresh: str) -> None:
        mark = _Mark(tokens, chars, bool(fresh) and not fresh.endswith(" "))
        if not self._starts and mark.grew:
            self._marks = [mark]
            return
        if self._marks and self._marks[-1].grew and fresh and not fresh.startswith(self._starts):
            del self._marks[:-1]
        self._marks.append(mark)
        del self._marks[:-WATCHED_EVENTS]

    def settle(self, tokens: int, chars: int) -> None:
        """So far somebody knows that nothing is held back."""
        self._marks = [_Mark(tokens, chars, grew=True)]

    def last(self) -> tuple[int, int]:
        """Where nothing is proven any more, the likeliest of the events still known."""
        if not self._marks:
            return 0, 0
        mark = next((mark for mark in self._marks if mark.grew), self._marks[0])
        return mark.tokens, mark.chars
