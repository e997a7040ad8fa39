"""What a request asks for: the few fields the gateway decides by, read from six protocols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from gateway.errors import ApiError, Code, Dialect, invalid
from gateway.prompts import MEDIA_FIELDS, all_of, read_prompts

__all__ = ["ROUTES", "Ask", "Dialect", "Limits", "read"]

ROUTES: Final = {
    "/generate": Dialect.GENERATE,
    "/v1/chat/completions": Dialect.CHAT,
    "/v1/completions": Dialect.COMPLETIONS,
    "/v1/responses": Dialect.RESPONSES,
    "/v1/messages": Dialect.MESSAGES,
    "/v1/embeddings": Dialect.EMBEDDINGS,
}

RID_CHARS: Final = 256
NAME_CHARS: Final = 512
INT64_MAX: Final = 2**63 - 1
ENCODABLE_DEPTH: Final = 250
"""orjson reads deeper nesting than it writes; what is read here must be written again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for; more is refused before anything is queued."""

    max_tokens: int = 1_048_576
    default_max_tokens: int = 4_096
    """Assumed where the protocol's own default is "until the context is full"."""
    max_prompts: int = 1_024
    max_samples: int = 128
    max_asks: int = 4_096
    """Prompts times samples: each becomes a pair of upstream requests."""


@dataclass(slots=True, kw_only=True)
class Ask:
    """One client request; `body` is the client's own, every field the gateway ignores included."""

    dialect: Dialect
    body: dict[str, Any]
    model: str
    stream: bool
    prompt_tokens: int
    """Of all prompts together; exact where token ids were sent, else an estimate."""
    max_tokens: int
    samples: int
    prompts: int
    batched: bool
    """The prompt came as a list, so the answer is one too, even for a single prompt."""
    service_tier: str
    priority: int | None
    resumable: bool
    """Token ids are in the stream and nothing in the request forbids to go on from them."""

    @property
    def fans_out(self) -> bool:
        """A prefill and decode pair takes one prompt and one sample at a time."""
        return self.samples > 1 or (self.batched and self.dialect is not Dialect.EMBEDDINGS)


def read(dialect: Dialect, raw: bytes, *, limits: Limits) -> Ask:
    """The request in `raw`, or an ApiError that names the parameter at fault."""
    body = _parse(raw)
    for name, value in body.items():
        if value is not None and (check := _CHECKS.get(name)) is not None:
            check(name, value)
    prompts, batched, prompt_tokens = read_prompts(dialect, body)
    if prompts > limits.max_prompts:
        raise invalid("the prompt", f"holds {prompts} prompts, at most {limits.max_prompts} go")
    samples, max_tokens = _amounts(dialect, body, prompts, limits)
    if (rid := body.get("rid")) is not None:
        _check_rid(rid, prompts if batched else 1)
    return Ask(
        dialect=dialect,
        body=body,
        model=body.get("model") or "",
        stream=body.get("stream") or False,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        samples=samples,
        prompts=prompts,
        batched=batched,
        service_tier=body.get("service_tier") or "",
        priority=body.get("priority"),
        resumable=not batched and samples == 1 and is_resumable(dialect, body),
    )


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(Code.INVALID_JSON, f"the body is not valid JSON: {error}") from error
    if type(body) is not dict:
        raise ApiError(Code.INVALID_REQUEST, "the body must be a JSON object")
    if raw.count(b"[") + raw.count(b"{") > ENCODABLE_DEPTH:
        _check_depth(body)
    return body


def _check_depth(body: dict[str, Any]) -> None:
    """Levels of brackets are at most their number, so that few requests need this second look."""
    level: list[Any] = [body]
    for _ in range(ENCODABLE_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise ApiError(Code.INVALID_REQUEST, "the body is nested too deeply")


# Fields that mean the same in every protocol. A value of None stands for "not given".


def _check_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise invalid(name, "must be true or false")


def _check_name(name: str, value: Any) -> None:
    if type(value) is not str:
        raise invalid(name, "must be a string")
    if len(value) > NAME_CHARS or not value.isprintable():
        raise invalid(name, f"must be printable and at most {NAME_CHARS} characters long")


def _check_int64(name: str, value: Any) -> None:
    if type(value) is not int or not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise invalid(name, "must be a 64-bit integer")


def _check_object(name: str, value: Any) -> None:
    if type(value) is not dict:
        raise invalid(name, "must be an object")


def _check_params(name: str, value: Any) -> None:
    for item in value if type(value) is list else (value,):
        _check_object(name, item)
        for inner in ("sampling_seed", "min_new_tokens"):
            if item.get(inner) is not None:
                _check_int64(f"{name}.{inner}", item[inner])
        if item.get("stop") is not None:
            _check_stop(f"{name}.stop", item["stop"])


def _check_stop(name: str, value: Any) -> None:
    if type(value) is not str and not all_of(value, str):
        raise invalid(name, "must be a string or a list of strings")


def _refuse_pairing(name: str, value: Any) -> None:
    raise invalid(name, "is chosen by the gateway and cannot be set by a client")


_CHECKS: Final[dict[str, Callable[[str, Any], None]]] = {
    "model": _check_name,
    "stream": _check_flag,
    "service_tier": _check_name,
    "priority": _check_int64,
    "seed": _check_int64,
    "min_tokens": _check_int64,
    "stop": _check_stop,
    "stream_options": _check_object,
    "sampling_params": _check_params,
    "bootstrap_host": _refuse_pairing,
    "bootstrap_port": _refuse_pairing,
    "bootstrap_room": _refuse_pairing,
}


def _check_rid(rid: Any, prompts: int) -> None:
    rids = rid if type(rid) is list else [rid]
    if type(rid) is list and len(rid) != prompts:
        raise invalid("rid", f"must be a string, or a list as long as the batch of {prompts}")
    for one in rids:
        if type(one) is not str or not one or len(one) > RID_CHARS or not one.isprintable():
            raise invalid("rid", f"must be printable and 1 to {RID_CHARS} characters long")
        if one.startswith("HEALTH_CHECK"):
            raise invalid("rid", "must not begin with HEALTH_CHECK, which servers keep for probes")
    if len(set(rids)) != len(rids):
        raise ApiError(Code.DUPLICATE_RID, "rid names the same request twice", param="rid")


# How much is asked for.

_MAX_TOKENS: Final[dict[Dialect, tuple[str, ...]]] = {
    Dialect.CHAT: ("max_completion_tokens", "max_tokens"),
    Dialect.COMPLETIONS: ("max_tokens",),
    Dialect.RESPONSES: ("max_output_tokens",),
    Dialect.MESSAGES: ("max_tokens",),
}
_SAMPLED: Final = (Dialect.CHAT, Dialect.COMPLETIONS)
GENERATE_MAX_TOKENS: Final = 128
COMPLETIONS_MAX_TOKENS: Final = 16


def _amounts(
    dialect: Dialect, body: dict[str, Any], prompts: int, limits: Limits
) -> tuple[int, int]:
    """Samples for each prompt, and tokens for each sample."""
    if dialect is Dialect.EMBEDDINGS:
        return 1, 0
    if dialect is Dialect.GENERATE:
        samples, max_tokens = _native_amounts(body, prompts, limits)
    else:
        samples, max_tokens = _openai_amounts(dialect, body, limits)
    if samples * prompts > limits.max_asks:
        raise invalid("n", f"times the prompts is more than {limits.max_asks}")
    return samples, max_tokens


def _openai_amounts(dialect: Dialect, body: dict[str, Any], limits: Limits) -> tuple[int, int]:
    samples = _samples(body, limits) if dialect in _SAMPLED else 1
    default = COMPLETIONS_MAX_TOKENS if dialect is Dialect.COMPLETIONS else None
    for name in reversed(_MAX_TOKENS[dialect]):
        if (value := body.get(name)) is not None:
            default = _count(name, value, 0, limits.max_tokens)
    return samples, limits.default_max_tokens if default is None else default


def _samples(body: dict[str, Any], limits: Limits) -> int:
    samples = 1 if body.get("n") is None else _count("n", body["n"], 1, limits.max_samples)
    if (best_of := body.get("best_of")) is not None and best_of != samples:
        raise ApiError(Code.UNSUPPORTED, "best_of other than n is not served", param="best_of")
    return samples


def _native_amounts(body: dict[str, Any], prompts: int, limits: Limits) -> tuple[int, int]:
    params = body.get("sampling_params")
    if params is None:
        return 1, GENERATE_MAX_TOKENS
    if type(params) is not list:
        return _one_amount(params, limits)
    if len(params) != prompts:
        raise invalid("sampling_params", f"must be one object or a list of {prompts}")
    each = [_one_amount(one, limits) for one in params]
    if len({samples for samples, _ in each}) > 1:
        raise invalid("sampling_params.n", "must be the same for all prompts of a batch")
    return each[0][0], max(tokens for _, tokens in each)


def _one_amount(params: dict[str, Any], limits: Limits) -> tuple[int, int]:
    samples, tokens = params.get("n"), params.get("max_new_tokens", GENERATE_MAX_TOKENS)
    return (
        1 if samples is None else _count("sampling_params.n", samples, 1, limits.max_samples),
        limits.default_max_tokens
        if tokens is None
        else _count("sampling_params.max_new_tokens", tokens, 0, limits.max_tokens),
    )


def _count(name: str, value: Any, least: int, most: int) -> int:
    """Clients in JavaScript write 16.0, which is an integer; 16.5 and true are not."""
    whole = type(value) is int or (type(value) is float and value.is_integer())
    if not whole or not least <= value <= most:
        raise invalid(name, f"must be an integer from {least} to {most}")
    return int(value)


# What may be resumed from its token ids.

_STATEFUL: Final = frozenset(
    (
        *("json_schema", "regex", "ebnf", "structural_tag", "response_format", "tools"),
        *("stop_regex", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("watermark", "use_beam_search", "beam_width", "best_of", "custom_logit_processor"),
        *("logprobs", "echo", "suffix", "return_logprob", "return_hidden_states"),
        *("return_entropy", "return_prompt_token_ids", "return_bytes", "session_params"),
        *("session_id", "input_embeds", *MEDIA_FIELDS),
    )
)
"""Fields whose effect depends on a state in the server that token ids do not carry."""
_NEUTRAL: Final = {"repetition_penalty": (1,), "beam_width": (1,), "best_of": (1,)}
_OFF: Final[tuple[Any, ...]] = (None, False, 0, "", [], {})


def is_resumable(dialect: Dialect, body: dict[str, Any]) -> bool:
    if dialect is Dialect.GENERATE:
        return _is_stateless(body) and _is_stateless(body.get("sampling_params") or {})
    if dialect is Dialect.COMPLETIONS:
        asked = body.get("return_token_ids") is True and body.get("stream") is True
        return asked and body.get("logprobs") is None and _is_stateless(body)
    return False


def assembled(ask: Ask) -> Ask:
    """A whole answer that is asked for as a stream, where that can be made one again: it can go on
    elsewhere then, and its servers show when its prompt is done."""
    body = ask.body
    asks_for_more = any(body[name] for name in body if name.startswith("return_"))
    if (
        ask.dialect is not Dialect.COMPLETIONS
        or ask.stream
        or ask.fans_out
        or asks_for_more
        or body.get("stream_options")
    ):
        return ask
    streamed = body | {
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    if not is_resumable(ask.dialect, streamed):
        return ask
    return replace(ask, body=streamed, resumable=True)


def _is_stateless(fields: dict[str, Any]) -> bool:
    if _STATEFUL.isdisjoint(fields):
        return True
    present = _STATEFUL.intersection(fields)
    return all(fields[name] in _NEUTRAL.get(name, ()) or fields[name] in _OFF for name in present)
