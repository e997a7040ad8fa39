"""Keys of how prompts begin: equal where the text is, and only there."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import Dialect, Limits, read
from gateway.prefixes import prefix_keys
from policies.prefixes import MOST_PREFIXES, Prefixes, prefix_tokens

FIELDS: dict[Dialect, str] = {
    Dialect.GENERATE: "text",
    Dialect.COMPLETIONS: "prompt",
    Dialect.RESPONSES: "input",
    Dialect.EMBEDDINGS: "input",
}


def keys(dialect: Dialect, **body: Any) -> tuple[int, ...]:
    return prefix_keys(read(dialect, orjson.dumps(body), limits=Limits()))


def chat(*contents: str, **fields: Any) -> tuple[int, ...]:
    turns = [{"role": "user", "content": content} for content in contents]
    return keys(Dialect.CHAT, messages=turns, **fields)


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_texts_share_as_many_keys_as_their_beginnings_are_long(
    common: int, own: int, others: int
) -> None:
    one = keys(Dialect.GENERATE, text="c" * common + "a" * own)
    other = keys(Dialect.GENERATE, text="c" * common + "b" * others)
    alike = common if own and others else common + min(own, others)
    tokens = (common if own and others else alike) // 4
    assert prefix_tokens(shared(one, other)) <= max(tokens, 0)
    assert 2 * prefix_tokens(shared(one, other)) > tokens or tokens < 128
    assert len(one) == max(0, ((common + own) // 256).bit_length())


def test_a_longer_conversation_begins_as_it_did() -> None:
    start, longer = chat("s" * 3000), chat("s" * 3000, "hello", "again")
    assert longer[: len(start)] == start
    assert len(start) == 4


def test_what_separates_caches_separates_keys() -> None:
    plain = chat("s" * 3000)
    for fields in ({"cache_salt": "b"}, {"model": "other"}, {"extra_key": "k"}):
        assert shared(plain, chat("s" * 3000, **fields)) == 0


@pytest.mark.parametrize(("dialect", "field"), FIELDS.items())
def test_every_protocol_has_keys_of_its_own_prompt(dialect: Dialect, field: str) -> None:
    one, other = (keys(dialect, **{field: letter * 600}) for letter in "ab")
    assert len(one) == len(other) == 2
    assert shared(one, other) == 0


def test_ids_have_keys_as_text_has() -> None:
    one = keys(Dialect.GENERATE, input_ids=list(range(200)))
    other = keys(Dialect.GENERATE, input_ids=[*range(100), *range(100)])
    assert (len(one), shared(one, other)) == (2, 1)
    assert keys(Dialect.COMPLETIONS, prompt=[2**40] * 100)


def test_a_field_of_another_protocol_has_no_say() -> None:
    plain = keys(Dialect.COMPLETIONS, prompt="p" * 600)
    assert keys(Dialect.COMPLETIONS, prompt="p" * 600, text=5, input_ids=True) == plain


def test_several_prompts_have_none() -> None:
    assert keys(Dialect.COMPLETIONS, prompt=["p" * 600, "q" * 600]) == ()


def test_a_server_is_remembered_by_its_latest_prompts() -> None:
    seen = Prefixes()
    seen.add(range(10))
    assert [seen.matched(row) for row in ([0, 1, 2], [0, 99, 2], [99], [])] == [3, 1, 0, 0]
    seen.add(range(100, 100 + MOST_PREFIXES - 1))
    assert (len(seen), seen.matched([9]), seen.matched([8])) == (MOST_PREFIXES, 1, 0)
