"""The prompt's log probabilities: the prefill server has them, the decode server answers."""

from __future__ import annotations

import orjson

from backends.sse import payloads

_FIELDS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def with_prompt_logprobs(answer: bytes, prefill: bytes) -> bytes:
    """The decode server's answer to /generate, with what the prefill server found put before it."""
    try:
        decoded = orjson.loads(answer)
        last = list(payloads(prefill))[-1:] or [orjson.loads(prefill)]
        found, meta = last[0]["meta_info"], decoded["meta_info"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return answer
    for name in _FIELDS:
        if found.get(name):
            meta[name] = found[name] + (meta.get(name) or [])
    return orjson.dumps(decoded)
