"""From a request body to engine requests: the parsing that SGLang's front does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeGuard

from backends.emulator.tokenizer import decode, encode
from backends.engine import Request, ids_prompt

Body = Mapping[str, Any]

MAX_ROOM = 2**63 - 1


class BadBody(Exception):
    """The body does not fit the route's schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What one HTTP request asks for, whatever its dialect."""

    requests: tuple[Request, ...]
    prompts: tuple[tuple[int, ...], ...]
    stream: bool
    many: bool
    """Whether the answer is a list."""
    model: str
    body: Body
    created: int = field(default_factory=lambda: int(datetime.now(UTC).timestamp()))
    """When it came, in seconds of the epoch: engines have a clock of their own."""


def read_generate(body: Body, model: str, *, fresh_rid: Callable[[], str]) -> Call:
    """POST /generate: text or input_ids, one or many."""
    prompts, many = _native_prompts(body)
    sampling = body.get("sampling_params") or {}
    count = len(prompts)
    samples = _samples(sampling)
    rids = _rids(body.get("rid"), count, many=many, fresh_rid=fresh_rid)
    requests = [
        _request(
            rid=rids[i] if samples == 1 else fresh_rid(),
            ids=prompts[i],
            sampling=sampling[i] if isinstance(sampling, list) else sampling,
            body=body,
            position=i if many else None,
            default_max=128,
        )
        for i in range(count)
        for _ in range(samples)
    ]
    return Call(
        requests=tuple(requests),
        prompts=tuple(tuple(prompts[i]) for i in range(count) for _ in range(samples)),
        stream=bool(body.get("stream", False)),
        many=many or samples > 1,
        model=model,
        body=body,
    )


def read_completion(body: Body, model: str, *, fresh_rid: Callable[[], str]) -> Call:
    """POST /v1/completions: a string, ids, or a list of either."""
    prompt = body.get("prompt")
    prompts, many = _id_prompts(prompt) if _is_ids(prompt) else _text_prompts(prompt, what="prompt")
    return _openai_call(body, model, prompts, many=many, default_max=16, fresh_rid=fresh_rid)


def read_chat(body: Body, model: str, *, fresh_rid: Callable[[], str]) -> Call:
    """POST /v1/chat/completions, and what other chat dialects are turned into."""
    ids = body.get("input_ids")
    if ids and not (isinstance(ids, list) and all(type(each) is int for each in ids)):
        raise BadBody("input_ids: a list of integers is required")
    prompt = list(ids) if ids else encode(chat_text(body.get("messages"), body))
    return _openai_call(body, model, [prompt], many=False, default_max=None, fresh_rid=fresh_rid)


def chat_text(messages: object, body: Body) -> str:
    """The toy chat template: one line a message, then the assistant's turn."""
    if not isinstance(messages, list) or not messages:
        raise BadBody("messages: a non-empty list is required")
    lines = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadBody("messages: each needs a role")
        lines.append(f"{message['role']}: {_content(message.get('content'))}")
    if body.get("continue_final_message"):
        return "\n".join(lines)
    return "\n".join([*lines, "assistant:"])


def _content(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _openai_call(
    body: Body,
    model: str,
    prompts: list[list[int]],
    *,
    many: bool,
    default_max: int | None,
    fresh_rid: Callable[[], str],
) -> Call:
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    sampling = {
        "max_new_tokens": default_max if asked is None else asked,
        "ignore_eos": body.get("ignore_eos", False),
        "stop": body.get("stop"),
        "stop_token_ids": body.get("stop_token_ids"),
    }
    samples = _samples(body)
    rids = _rids(body.get("rid"), len(prompts), many=many, fresh_rid=fresh_rid)
    requests = [
        _request(
            rid=rids[i] if samples == 1 else fresh_rid(),
            ids=ids,
            sampling=sampling,
            body=body,
            position=i if many else None,
            default_max=default_max,
        )
        for i, ids in enumerate(prompts)
        for _ in range(samples)
    ]
    return Call(
        requests=tuple(requests),
        prompts=tuple(tuple(ids) for ids in prompts for _ in range(samples)),
        stream=bool(body.get("stream", False)),
        many=True,
        model=str(body.get("model") or model),
        body=body,
    )


def _request(
    *,
    rid: str,
    ids: list[int],
    sampling: Body,
    body: Body,
    position: int | None,
    default_max: int | None,
) -> Request:
    if not ids:
        raise BadBody("the prompt is empty")
    limit = sampling.get("max_new_tokens", default_max)
    if limit is not None and (not _is_int(limit) or limit < 0):
        raise BadBody(f"max_new_tokens must be at least 0, got {limit!r}")
    stops = _stops(sampling.get("stop"))
    return Request(
        rid=rid,
        prompt=ids_prompt(ids),
        max_new_tokens=limit,
        ignore_eos=bool(sampling.get("ignore_eos", False)),
        stop_token_ids=tuple(sampling.get("stop_token_ids") or ()),
        stopper=_stopper(stops) if stops else None,
        stream=True,
        priority=body.get("priority"),
        space=f"{body.get('extra_key') or ''}\0{body.get('cache_salt') or ''}",
        bootstrap_host=_item(body.get("bootstrap_host"), position) or "",
        bootstrap_port=_item(body.get("bootstrap_port"), position),
        bootstrap_room=_room(body.get("bootstrap_room"), position),
    )


def _native_prompts(body: Body) -> tuple[list[list[int]], bool]:
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise BadBody("Either text, input_ids or input_embeds should be provided.")
    return _text_prompts(text, what="text") if ids is None else _id_prompts(ids)


def _text_prompts(value: object, *, what: str) -> tuple[list[list[int]], bool]:
    if isinstance(value, str):
        return [encode(value)], False
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [encode(item) for item in value], True
    raise BadBody(f"{what}: a string or a non-empty list of strings is required")


def _id_prompts(value: object) -> tuple[list[list[int]], bool]:
    if _is_id_list(value):
        return [value], False
    if isinstance(value, list) and value and all(_is_id_list(item) for item in value):
        return [list(item) for item in value], True
    raise BadBody("input_ids: a list of token ids, or a list of such lists, is required")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], str)


def _is_id_list(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(_is_int(item) and 0 <= item < 2**32 for item in value)
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _samples(sampling: object) -> int:
    first = sampling[0] if isinstance(sampling, list) and sampling else sampling
    samples = first.get("n") if isinstance(first, Mapping) else None
    if samples is None:
        return 1
    if not isinstance(samples, int) or samples < 1:
        raise BadBody(f"n must be at least 1, got {samples!r}")
    return samples


def _rids(rid: object, count: int, *, many: bool, fresh_rid: Callable[[], str]) -> list[str]:
    if rid is None:
        return [fresh_rid() for _ in range(count)]
    if isinstance(rid, list):
        if len(rid) != count:
            raise BadBody("The rids length does not match the batch size")
        return [str(item) for item in rid]
    return [f"{rid}_{i}" for i in range(count)] if many else [str(rid)]


def _item(value: Any, position: int | None) -> Any:
    return value[position or 0] if isinstance(value, list) else value


def _room(value: Any, position: int | None) -> int | None:
    room = _item(value, position)
    if room is None:
        return None
    if not _is_int(room) or not 0 <= room <= MAX_ROOM:
        raise BadBody(f"bootstrap_room must be an integer within 64 bits, got {room!r}")
    shifted: int = room if isinstance(value, list) else room + (position or 0)
    return shifted


def _stops(stop: object) -> tuple[str, ...]:
    if not stop:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(str(item) for item in stop)  # type: ignore[attr-defined]


def _stopper(stops: tuple[str, ...]) -> Callable[[list[int]], str | None]:
    reach = max(len(stop) for stop in stops)

    def matched(ids: list[int]) -> str | None:
        tail = decode(ids[-reach - 1 :])
        return next((stop for stop in stops if stop in tail), None)

    return matched
