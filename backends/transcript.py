"""What a job has been given so far, kept so that it can go on elsewhere from its last token."""

from __future__ import annotations

from typing import Any, Final

import orjson

from backends.progress import (
    Kind,
    Progress,
    Settling,
    carries_tokens,
    choice_of,
    choice_parts,
    count_of,
    error_of,
    is_native,
    kind_of,
    meta_of,
)
from backends.splice import Splicer, stops_of, token_limit
from backends.sse import ends_stream, payload, payloads, split_events
from backends.trouble import Blame, Trouble, judge_answer, judge_event

__all__ = [
    "Blame",
    "Kind",
    "Progress",
    "Splicer",
    "Transcript",
    "Trouble",
    "ends_stream",
    "judge_answer",
    "judge_event",
    "resumed_body",
]

COMPACT_BYTES: Final = 65_536
KEPT_EVENTS: Final = 6
"""Of a long cumulative stream: a character takes at most four tokens, fewer than these hold."""


class Transcript:
    """Fed what the client gets, not what each attempt sends: a second resume is like the first.

    Bytes are kept as they come and read only when they are asked for, or when they are many.
    """

    __slots__ = ("_kept_bytes", "_limit_bytes", "_pieces", "_stops", "_tally", "kind")

    def __init__(self, kind: Kind | None = None, *, stops: tuple[str, ...] = ()) -> None:
        self.kind = kind
        """Told by the server's settings, else by its first events, else SGLang's default."""
        self._pieces: list[bytes] = []
        self._kept_bytes = 0
        self._limit_bytes = COMPACT_BYTES
        self._stops = stops
        self._tally = _Tally(stops)

    @classmethod
    def of(cls, body: dict[str, Any], *, incremental: bool | None = None) -> Transcript:
        """For the answer to `body`, from a server that streams increments or does not, if known."""
        native = {True: Kind.INCREMENTAL, False: Kind.CUMULATIVE, None: None}[incremental]
        kind = Kind.COMPLETIONS if "prompt" in body else native
        return cls(kind, stops=stops_of(body, kind))

    @classmethod
    def begun(cls, body: dict[str, Any], event: dict[str, Any]) -> Transcript:
        """An answer to `body` that has come as far as `event` tells, and that far is settled."""
        transcript = cls.of(body, incremental=True)
        transcript._tally.begin(event)
        return transcript

    def feed(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._kept_bytes += len(piece)
        if self._kept_bytes > self._limit_bytes:
            self._compact()

    def state(self) -> Progress:
        """A torn last event counts for nothing: the client could not read it either."""
        kept = self._compact()
        if self.kind is Kind.INCREMENTAL or self.kind is Kind.COMPLETIONS:
            return self._tally.progress(self.kind)
        latest = _Latest(self._stops, from_start=not self._tally.dropped)
        for event in payloads(kept):
            latest.add(event)
        return latest.progress()

    def final_answer(self) -> bytes:
        """What would have been answered without a stream."""
        kept = self._compact()
        if self.kind is Kind.INCREMENTAL:
            return self._tally.answer()
        if self.kind is Kind.COMPLETIONS:
            return self._tally.completion()
        for event in reversed(split_events(kept)):
            if (found := payload(event)) is not None and is_native(found):
                return event.removeprefix(b"data: ").rstrip(b"\n")
        raise ValueError("no answer has been streamed")

    def _compact(self) -> bytes:
        """Keeps of a cumulative stream the last events, and of any other what they add up to."""
        kept = b"".join(self._pieces)
        end = kept.rfind(b"\n\n") + 2 if b"\n\n" in kept else 0
        if self.kind is None:
            self.kind = _find_kind(kept[:end])
        if self.kind is Kind.INCREMENTAL or self.kind is Kind.COMPLETIONS:
            for event in payloads(kept[:end]):
                self._tally.add(event)
            kept = kept[end:]
        elif self.kind is Kind.CUMULATIVE and len(kept) > COMPACT_BYTES:
            start = _last_events(kept[:end])
            self._tally.dropped = self._tally.dropped or start > 0
            kept = kept[start:]
        self._pieces = [kept]
        self._kept_bytes = len(kept)
        self._limit_bytes = max(COMPACT_BYTES, 2 * len(kept))
        return kept


def _find_kind(events: bytes) -> Kind | None:
    first: dict[str, Any] | None = None
    for event in payloads(events):
        if not carries_tokens(event):
            continue
        if choice_of(event) is not None:
            return Kind.COMPLETIONS
        if first is not None and (kind := kind_of(first, event)) is not None:
            return kind
        first = event
    return None


def _last_events(events: bytes) -> int:
    """Where the last few events begin. As a key the word has bare quotes, in text never."""
    at = len(events)
    for _ in range(KEPT_EVENTS):
        at = events.rfind(b'"output_ids"', 0, at)
        if at < 0:
            return 0
    found = events.rfind(b"\n\n", 0, at)
    return found + 2 if found >= 0 else 0


class _Latest:
    """Reads events that each hold everything so far."""

    __slots__ = ("_chars", "_error", "_event", "_settling")

    def __init__(self, stops: tuple[str, ...], *, from_start: bool) -> None:
        self._event: dict[str, Any] = {}
        self._error: dict[str, Any] | None = None
        self._settling = Settling(stops, from_start=from_start)
        self._chars: int | None = 0 if from_start else None

    def add(self, event: dict[str, Any]) -> None:
        self._error = error_of(event) or self._error
        if is_native(event):
            text = event.get("text", "")
            self._event = event
            fresh = "" if self._chars is None else text[self._chars :]
            self._settling.note(len(event["output_ids"]), len(text), fresh)
            self._chars = len(text)

    def progress(self) -> Progress:
        ids, text = self._event.get("output_ids", []), self._event.get("text", "")
        return _native_progress(
            Kind.CUMULATIVE, self._event, ids, text, self._error, self._settling
        )


def _native_progress(
    kind: Kind,
    event: dict[str, Any],
    ids: list[int],
    text: str,
    error: dict[str, Any] | None,
    settling: Settling,
) -> Progress:
    meta = meta_of(event)
    whole = bool(meta.get("finish_reason")) or "text" not in event
    settled = (len(ids), len(text)) if whole else settling.last()
    return Progress(
        kind=kind,
        output_ids=ids,
        text=text,
        prompt_tokens=count_of(meta, "prompt_tokens"),
        cached_tokens=count_of(meta, "cached_tokens"),
        finish_reason=meta.get("finish_reason"),
        last_meta=meta,
        error=error,
        settled_tokens=settled[0],
        settled_chars=settled[1],
        shown_tokens=len(ids),
        shown_chars=len(text),
    )


class _Tally:
    """Adds up events that each hold only what is new."""

    __slots__ = (
        *("_chars", "_error", "_event", "_finish", "_ids", "_lists", "_meta", "_settling"),
        *("_texts", "dropped"),
    )

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.dropped = False
        """Earlier events of a cumulative stream are gone; nothing was added from them."""
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._chars = 0
        self._event: dict[str, Any] = {}
        self._meta: dict[str, Any] = {}
        self._lists: dict[str, list[Any]] = {}
        self._finish: str | None = None
        self._error: dict[str, Any] | None = None
        self._settling = Settling(stops)

    def add(self, event: dict[str, Any]) -> None:
        self._error = error_of(event) or self._error
        if is_native(event):
            self._event = event
            self._add_lists(meta_of(event))
            self._extend(event["output_ids"], event.get("text", ""))
        elif "choices" in event:
            self._add_chunk(event)

    def begin(self, event: dict[str, Any]) -> None:
        """With what an earlier process was given of the same answer."""
        self.add(event)
        self._settling.settle(len(self._ids), self._chars)

    def _extend(self, ids: list[int], text: str) -> None:
        self._ids += ids
        self._texts.append(text)
        self._chars += len(text)
        self._settling.note(len(self._ids), self._chars, text)

    def _add_lists(self, meta: dict[str, Any]) -> None:
        """Log probabilities of the output come in slices, those of the prompt once."""
        for name, value in meta.items():
            if type(value) is not list:
                continue
            if name.startswith("output_"):
                self._lists.setdefault(name, []).extend(value)
            elif value:
                self._lists.setdefault(name, value)

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        for name in ("id", "created", "model"):
            if chunk.get(name) is not None:
                self._meta.setdefault(name, chunk[name])
        if type(chunk.get("usage")) is dict:
            self._meta["usage"] = chunk["usage"]
        choice = choice_of(chunk)
        for holder in (chunk, choice or {}):
            if type(holder.get("prompt_token_ids")) is list:
                self._meta.setdefault("prompt_token_ids", holder["prompt_token_ids"])
        if choice is not None:
            self._finish = choice.get("finish_reason") or self._finish
            if choice.get("matched_stop") is not None:
                self._meta["matched_stop"] = choice["matched_stop"]
            self._extend(*choice_parts(choice))

    def progress(self, kind: Kind) -> Progress:
        self._texts = ["".join(self._texts)]
        text = self._texts[0]
        if kind is Kind.INCREMENTAL:
            return _native_progress(
                kind, self._event, self._ids[:], text, self._error, self._settling
            )
        usage = self._meta.get("usage", {})
        prompt_tokens = len(self._meta.get("prompt_token_ids", ()))
        tokens, chars = (len(self._ids), len(text)) if self._finish else self._settling.last()
        return Progress(
            kind=kind,
            output_ids=self._ids[:],
            text=text,
            prompt_tokens=prompt_tokens or count_of(usage, "prompt_tokens"),
            cached_tokens=count_of(usage.get("prompt_tokens_details"), "cached_tokens"),
            finish_reason=self._finish,
            last_meta=dict(self._meta),
            error=self._error,
            settled_tokens=tokens,
            settled_chars=chars,
            shown_tokens=len(self._ids),
            shown_chars=len(text),
        )

    def answer(self) -> bytes:
        whole: dict[str, Any] = {"output_ids": self._ids}
        if "text" in self._event:
            whole = {"text": "".join(self._texts)} | whole
        return orjson.dumps(self._event | whole | {"meta_info": meta_of(self._event) | self._lists})

    def completion(self) -> bytes:
        """Its server would have added `metadata`, of which its stream says nothing."""
        meta = self._meta
        prompt_tokens = len(meta.get("prompt_token_ids", ()))
        counted = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + len(self._ids),
            "completion_tokens": len(self._ids),
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        }
        choice = {
            "index": 0,
            "text": "".join(self._texts),
            "logprobs": None,
            "finish_reason": self._finish,
            "matched_stop": meta.get("matched_stop"),
        }
        whole = {name: meta.get(name) for name in ("id", "created", "model")}
        usage = counted | meta.get("usage", {})
        return orjson.dumps(
            whole | {"object": "text_completion", "choices": [choice], "usage": usage}
        )


def resumed_body(body: dict[str, Any], prompt_ids: list[int], progress: Progress) -> dict[str, Any]:
    """The body that continues `progress`: what was generated becomes part of the prompt.

    Take `transcript.state().settled()`, and give the Splicer the same.
    """
    made = len(progress.output_ids)
    ids = prompt_ids + progress.output_ids
    limit = token_limit(body, progress.kind)
    left = None if limit is None else max(1, limit - made)
    if progress.kind is Kind.COMPLETIONS:
        return _resumed_completion(body, ids, left, made)
    params = dict(body.get("sampling_params") or {})
    params["max_new_tokens"] = left
    if params.get("min_new_tokens"):
        params["min_new_tokens"] = max(0, params["min_new_tokens"] - made)
    resumed = body | {"input_ids": ids, "sampling_params": params, "stream": True}
    resumed.pop("text", None)
    return resumed


def _resumed_completion(
    body: dict[str, Any], ids: list[int], left: int | None, made: int
) -> dict[str, Any]:
    if body.get("echo"):
        raise ValueError("an echoed prompt would echo what was generated, too")
    resumed = body | {"prompt": ids, "max_tokens": left, "stream": True}
    resumed["return_token_ids"] = True
    if body.get("min_tokens"):
        resumed["min_tokens"] = max(0, body["min_tokens"] - made)
    return resumed
