from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.emulator.tokenizer import decode, encode
from backends.engine.tokens import Script, pack

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts)
def test_any_text_comes_back(text: str) -> None:
    assert decode(encode(text)) == text


@given(st.binary(min_size=1), st.integers(1, 50))
def test_generated_tokens_survive_their_own_text(seed: bytes, count: int) -> None:
    ids = Script(seed, eos_every=10**9).first(count)
    assert encode(decode(ids)) == ids


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1), st.integers(1, 20), st.integers(1, 20))
def test_a_script_goes_on_where_another_stopped(ids: list[int], cut: int, more: int) -> None:
    whole = Script(pack(ids), 50).first(cut + more)
    assert Script(pack(ids + whole[:cut]), 50).first(more) == whole[cut:]


def test_plain_text_takes_about_four_characters_a_token() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    assert 3.5 < len(text) / len(encode(text)) <= 4
