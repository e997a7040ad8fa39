"""How one request for many answers becomes many requests for one, and their answers one again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

import orjson

from backends.sse import DONE, Events, as_event, payload, split_events
from gateway.dialects import GENERATE_MAX_TOKENS, Ask, Dialect, is_resumable
from gateway.errors import ApiError, Code, invalid
from gateway.prompts import MEDIA_FIELDS, read_prompts

_PROMPT_FIELDS: Final = {
    Dialect.GENERATE: ("text", "input_ids", "input_embeds"),
    Dialect.COMPLETIONS: ("prompt",),
    Dialect.EMBEDDINGS: ("input",),
}
_PER_PROMPT_FIELDS: Final = (
    *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num"),
    *("return_hidden_states", "lora_path", "custom_logit_processor", "session_params"),
    *("extra_key", "routing_key", *MEDIA_FIELDS),
)
"""Fields of /generate that hold one value for all prompts, or a list with one for each."""


def split(ask: Ask) -> list[Ask]:
    """One ask for each sample of each prompt, in the order in which their answers are counted."""
    parts = []
    for prompt in range(ask.prompts):
        body = _body_of_prompt(ask, prompt)
        tokens = read_prompts(ask.dialect, body)[2]
        parts += [_part(ask, body, prompt, sample, tokens) for sample in range(ask.samples)]
    return parts


def _body_of_prompt(ask: Ask, prompt: int) -> dict[str, Any]:
    body = dict(ask.body)
    if not ask.batched:
        return body
    for name in _PROMPT_FIELDS.get(ask.dialect, ()):
        if body.get(name) is not None:
            body[name] = body[name][prompt]
    if ask.dialect is Dialect.GENERATE:
        for name in _PER_PROMPT_FIELDS:
            if type(body.get(name)) is list:
                body[name] = _item(name, body[name], prompt, ask.prompts)
        ids = body.get("token_ids_logprob")
        if type(ids) is list and ids and type(ids[0]) is list:
            body["token_ids_logprob"] = _item("token_ids_logprob", ids, prompt, ask.prompts)
    return body


def _item(name: str, values: list[Any], prompt: int, prompts: int) -> Any:
    if len(values) != prompts:
        raise invalid(name, f"must be as long as the batch of {prompts}, or one value for all")
    return values[prompt]


def _part(ask: Ask, body: dict[str, Any], prompt: int, sample: int, tokens: int) -> Ask:
    """The prompt itself is shared by its samples: bodies are never changed in place."""
    max_tokens = ask.max_tokens
    if ask.dialect is Dialect.GENERATE:
        params = _one_sample(body.get("sampling_params") or {}, sample, "sampling_seed")
        body = body | {"sampling_params": params}
        limit = params.get("max_new_tokens", GENERATE_MAX_TOKENS)
        max_tokens = max_tokens if limit is None else int(limit)
    else:
        body = _one_sample(body, sample, "seed")
        body.pop("best_of", None)
    if (rid := body.get("rid")) is not None:
        body["rid"] = _rid_of(ask, rid, prompt, sample)
    return replace(
        ask,
        body=body,
        prompt_tokens=tokens,
        max_tokens=max_tokens,
        samples=1,
        prompts=1,
        batched=False,
        resumable=is_resumable(ask.dialect, body),
    )


def _one_sample(settings: dict[str, Any], sample: int, seed: str) -> dict[str, Any]:
    """Samples that share a seed would be equal."""
    settings = {name: value for name, value in settings.items() if name != "n"}
    if sample and settings.get(seed) is not None:
        settings[seed] = (settings[seed] + sample) & (2**63 - 1)
    return settings


def _rid_of(ask: Ask, rid: str | list[str], prompt: int, sample: int) -> str:
    if type(rid) is list:
        one = rid[prompt if ask.batched else 0]
    else:
        one = f"{rid}_{prompt}" if ask.batched else str(rid)
    return f"{one}_{sample}" if ask.samples > 1 else one


def merge_answers(ask: Ask, parts: list[bytes]) -> bytes:
    """The answer of the whole from the answers to `split(ask)`, in their order."""
    if ask.dialect is Dialect.GENERATE:
        return b"[" + b",".join(parts) + b"]"
    try:
        values = [orjson.loads(part) for part in parts]
    except orjson.JSONDecodeError as error:
        raise ApiError(Code.UPSTREAM_FAILED, "a server's answer is not valid JSON") from error
    name = "data" if ask.dialect is Dialect.EMBEDDINGS else "choices"
    if name not in values[0]:
        return parts[0]
    items = [item | {"index": index} for index, value in enumerate(values) for item in value[name]]
    merged = values[0] | {name: items}
    if any(usages := [value.get("usage") for value in values]):
        merged["usage"] = merge_usage(usages, ask.samples)
    return orjson.dumps(merged)


def merge_usage(usages: list[dict[str, Any] | None], samples: int) -> dict[str, Any]:
    """A prompt counts once for all its samples, whatever each of them generated counts."""
    prompts = [usage for usage in usages[::samples] if usage]
    known = [usage for usage in usages if usage]
    merged = _summed(known, skip=("prompt_tokens", "prompt_tokens_details"))
    merged |= _summed(prompts, only=("prompt_tokens", "prompt_tokens_details"))
    counted = merged.get("prompt_tokens", 0) + merged.get("completion_tokens", 0)
    return merged | {"total_tokens": counted}


def _summed(
    usages: list[dict[str, Any]], *, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for name, value in _numbers(usages, only, skip):
        if type(value) is dict:
            total[name] = _summed([total.get(name) or {}, value])
        elif type(value) is int and type(total.get(name, 0)) is int:
            total[name] = total.get(name, 0) + value
        else:
            total.setdefault(name, value)
    return total


def _numbers(
    usages: Iterable[dict[str, Any]], only: tuple[str, ...], skip: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    for usage in usages:
        for name, value in usage.items():
            if name not in skip and (not only or name in only) and value is not None:
                yield name, value


class StreamMerger:
    """Makes one stream of the parts' streams, as if one server had sent them in turns."""

    __slots__ = ("_ask", "_events", "_names", "_open", "_usages", "_wants_usage", "failed")

    def __init__(self, ask: Ask) -> None:
        parts = ask.samples * ask.prompts
        options = ask.body.get("stream_options") or {}
        self._ask = ask
        self._events = [Events() for _ in range(parts)]
        self._open = set(range(parts))
        self._usages: list[dict[str, Any] | None] = [None] * parts
        self._names: dict[str, Any] = {}
        self._wants_usage = bool(options.get("include_usage"))
        self.failed: int | None = None
        """The part whose error has ended the whole stream: cancel the others."""

    def feed(self, part: int, piece: bytes) -> bytes:
        out: list[bytes] = []
        for event in split_events(self._events[part].cut(piece)):
            if self.failed is not None:
                break
            out.append(self._rewrite(part, event))
        return b"".join(out)

    def finish(self, part: int) -> bytes:
        """The end of a part's stream; the end of all of them is the end of the whole."""
        if part not in self._open:
            return b""
        self._open.discard(part)
        if self._open or self.failed is not None:
            return b""
        return self._usage_chunk() + DONE

    def _rewrite(self, part: int, event: bytes) -> bytes:
        if (value := payload(event)) is None:
            return b"" if event.startswith(b"data:") else event
        if value.get("error"):
            self.failed = part
            return event + DONE
        if self._ask.dialect is Dialect.GENERATE:
            return as_event(value | {"index": part})
        return self._rewrite_chunk(part, value)

    def _rewrite_chunk(self, part: int, chunk: dict[str, Any]) -> bytes:
        if not self._names:
            self._names = {name: chunk[name] for name in _SHARED if name in chunk}
        if type(chunk.get("usage")) is dict:
            self._usages[part] = chunk["usage"]
        choices = chunk.get("choices")
        if type(choices) is not list or not choices:
            return b""
        chunk["choices"] = [one | {"index": part} for one in choices if type(one) is dict]
        return as_event(chunk | self._names)

    def _usage_chunk(self) -> bytes:
        if not self._wants_usage or not any(self._usages):
            return b""
        usage = merge_usage(self._usages, self._ask.samples)
        return as_event({**self._names, "choices": [], "usage": usage})


_SHARED: Final = ("id", "object", "created", "model", "system_fingerprint")
