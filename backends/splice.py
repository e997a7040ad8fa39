"""How the stream of a later attempt becomes the rest of the first one, as if nothing had been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from backends.progress import (
    Kind,
    Progress,
    choice_of,
    choice_parts,
    count_of,
    is_native,
    kind_of,
    meta_of,
)
from backends.sse import DONE, Events, as_event, payload, split_events

_DEFAULT_LIMITS: Final = {
    Kind.CUMULATIVE: ("max_new_tokens", 128),
    Kind.INCREMENTAL: ("max_new_tokens", 128),
    Kind.COMPLETIONS: ("max_tokens", 16),
}


def _settings(body: dict[str, Any], kind: Kind | None) -> dict[str, Any]:
    return body if kind is Kind.COMPLETIONS else body.get("sampling_params") or {}


def stops_of(body: dict[str, Any], kind: Kind | None) -> tuple[str, ...]:
    stop = _settings(body, kind).get("stop")
    return tuple(one for one in (stop if type(stop) is list else [stop]) if one)


def token_limit(body: dict[str, Any], kind: Kind) -> int | None:
    """How many tokens the answer may have; None is until the context is full."""
    name, default = _DEFAULT_LIMITS[kind]
    settings = _settings(body, kind)
    limit = settings.get(name, default)
    if limit is None and kind is Kind.COMPLETIONS:
        limit = default
    return None if limit is None else int(limit)


@dataclass(slots=True)
class _Seam:
    """Looks for stop strings that begin in the earlier text and end in the later one."""

    stops: tuple[str, ...]
    tail: str

    @classmethod
    def of(cls, stops: tuple[str, ...], earlier: str) -> _Seam:
        longest = max(map(len, stops), default=0)
        return cls(stops, earlier[max(0, len(earlier) - longest + 1) :] if longest > 1 else "")

    def find(self, later: str) -> tuple[int, str] | None:
        """Where the earliest one begins, counted back from the seam."""
        hits = []
        for stop in self.stops if self.tail else ():
            joined = self.tail + later[: len(stop)]
            at = joined.find(stop, max(0, len(self.tail) - len(stop) + 1))
            if 0 <= at < len(self.tail):
                hits.append((len(self.tail) - at, stop))
        return max(hits, default=None)

    def is_open(self, later: str) -> bool:
        """All of the later text may still turn out to be part of one."""
        return any(
            len(later) < len(stop) and stop.startswith(self.tail[at:] + later)
            for stop in self.stops
            for at in range(max(0, len(self.tail) - len(stop) + 1), len(self.tail))
        )


class Splicer:
    """Rewrites an attempt's events for a client who has seen `earlier`; `body` is the client's."""

    __slots__ = (
        *("_body", "_earlier", "_events", "_first", "_ids", "_kind", "_limit", "_seam"),
        *("_shown_chars", "_later", "_shown_ids", "finished"),
    )

    def __init__(self, body: dict[str, Any], earlier: Progress) -> None:
        self._body = body
        self._earlier = earlier
        self._events = Events()
        self._kind: Kind | None = None
        self._first: dict[str, Any] | None = None
        self._ids: list[int] = []
        self._later = ""
        self._shown_chars = earlier.shown_chars
        self._shown_ids = earlier.shown_tokens - len(earlier.output_ids)
        self._limit = token_limit(body, earlier.kind)
        self._seam = _Seam.of(stops_of(body, earlier.kind), earlier.text)
        self.finished = False
        """The stream was ended here, before the server would have: cancel what still runs."""

    def feed(self, piece: bytes) -> bytes:
        out: list[bytes] = []
        for event in split_events(self._events.cut(piece)):
            if self.finished:
                break
            out.append(self._rewrite(event))
        return b"".join(out)

    def _rewrite(self, event: bytes) -> bytes:
        if (value := payload(event)) is None or value.get("error"):
            return event
        if is_native(value):
            self._rewrite_native(value)
        elif "choices" in value:
            self._rewrite_chunk(value)
        else:
            return event
        return as_event(value) + (self._ending(value) if self.finished else b"")

    def _rewrite_native(self, value: dict[str, Any]) -> None:
        meta = meta_of(value)
        ids, later = self._what_is_new(value)
        shown, ids, stop = self._advance(ids, later, final=bool(meta.get("finish_reason")))
        cumulative = self._earlier.kind is Kind.CUMULATIVE
        value["output_ids"] = self._earlier.output_ids + self._ids if cumulative else ids
        if "text" in value:
            value["text"] = self._text[: self._shown_chars] if cumulative else shown
        value.pop("prompt_token_ids", None)
        self._mend_meta(meta)
        if stop is not None:
            meta["finish_reason"] = {"type": "stop", "matched": stop}
        elif self.finished:
            meta["finish_reason"] = {"type": "length", "length": self._made}

    def _mend_meta(self, meta: dict[str, Any]) -> None:
        earlier = self._earlier
        meta["id"] = earlier.last_meta.get("id", meta.get("id"))
        meta["prompt_tokens"] = self._prompt_tokens(count_of(meta, "prompt_tokens"))
        meta["completion_tokens"] = self._made
        meta["cached_tokens"] = earlier.cached_tokens
        if thought := count_of(earlier.last_meta, "reasoning_tokens"):
            meta["reasoning_tokens"] = thought + count_of(meta, "reasoning_tokens")
        reason = meta.get("finish_reason")
        if type(reason) is dict and reason.get("type") == "length":
            reason["length"] = self._made

    def _rewrite_chunk(self, chunk: dict[str, Any]) -> None:
        for name in ("id", "created"):
            chunk[name] = self._earlier.last_meta.get(name, chunk.get(name))
        chunk.pop("prompt_token_ids", None)
        if (choice := choice_of(chunk)) is not None:
            self._rewrite_choice(choice)
        if type(usage := chunk.get("usage")) is dict:
            chunk["usage"] = self._usage(usage)

    def _rewrite_choice(self, choice: dict[str, Any]) -> None:
        ids, text = choice_parts(choice)
        shown, ids, stop = self._advance(
            ids, self._later + text, final=bool(choice.get("finish_reason"))
        )
        choice |= {"token_ids": ids, "text": shown}
        choice.pop("prompt_token_ids", None)
        if stop is not None:
            choice |= {"finish_reason": "stop", "matched_stop": stop}
        elif self.finished:
            choice["finish_reason"] = "length"

    def _what_is_new(self, value: dict[str, Any]) -> tuple[list[int], str]:
        """The ids that are new in this event, and all text of this attempt: a server that finds
        a stop string may take back text, so that only the whole is right."""
        if self._kind is None and self._first is not None:
            self._kind = kind_of(self._first, value)
        self._first = value | {"meta_info": dict(meta_of(value))}
        ids, text = value["output_ids"], value.get("text", "")
        if self._kind is Kind.INCREMENTAL:
            return ids, self._later + text
        return ids[len(self._ids) :], text

    def _advance(
        self, ids: list[int], later: str, *, final: bool
    ) -> tuple[str, list[int], str | None]:
        """What to show of the text now, the ids to show, and the stop string that ends it."""
        if self._limit is not None and self._made + len(ids) > self._limit:
            ids, self.finished = ids[: max(0, self._limit - self._made)], True
        else:
            self._later = later
        self._ids += ids
        ids = self._ids[self._shown_ids :]
        self._shown_ids = max(self._shown_ids, len(self._ids))
        if (hit := self._seam.find(self._later)) is not None:
            return self._stop_at(*hit), ids, hit[1]
        if self._later and not final and self._seam.is_open(self._later):
            return "", ids, None
        return self._show(len(self._earlier.text) + len(self._later)), ids, None

    def _show(self, end: int) -> str:
        """Text that the client has not had yet; at first it may have had more than was kept."""
        shown = self._text[self._shown_chars : end]
        self._shown_chars = max(self._shown_chars, end)
        return shown

    def _stop_at(self, back: int, stop: str) -> str:
        """A client that is given the whole text each time sees the stop string taken away again."""
        self.finished = True
        end = len(self._earlier.text) - back
        if _settings(self._body, self._earlier.kind).get("no_stop_trim"):
            end += len(stop)
        shown = self._show(end)
        self._shown_chars = end
        return shown

    @property
    def _text(self) -> str:
        return self._earlier.text + self._later

    @property
    def _made(self) -> int:
        return len(self._earlier.output_ids) + len(self._ids)

    def _prompt_tokens(self, reported: int) -> int:
        return self._earlier.prompt_tokens or max(0, reported - len(self._earlier.output_ids))

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        prompt = self._prompt_tokens(count_of(usage, "prompt_tokens"))
        counts: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": self._made,
            "total_tokens": prompt + self._made,
        }
        if type(details := usage.get("prompt_tokens_details")) is dict:
            cached = min(prompt, count_of(details, "cached_tokens"))
            counts["prompt_tokens_details"] = details | {"cached_tokens": cached}
        return {**usage, **counts}

    def _ending(self, last: dict[str, Any]) -> bytes:
        """What the server would have sent after its last chunk."""
        options = self._body.get("stream_options") or {}
        if self._earlier.kind is not Kind.COMPLETIONS or not options.get("include_usage"):
            return DONE
        return as_event(last | {"choices": [], "usage": self._usage({})}) + DONE
