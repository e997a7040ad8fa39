"""A reversible tokenizer without a vocabulary file: about four characters a token."""

from __future__ import annotations

import re
from collections.abc import Iterable

from backends.engine.tokens import FIRST_WORD, WORDS

FIRST_BYTE = 3
FIRST_PACKED = 1024
_WORD_IDS = {f" {word}": FIRST_WORD + index for index, word in enumerate(WORDS)}
_WORD_TEXTS = tuple(_WORD_IDS)
_WORD = r" [bdfgklmn][aeio][lmnrstkp](?![a-z])"
_PIECES = re.compile(rf"{_WORD}|[\x00-\x7f]{{1,4}}?(?={_WORD})|[\x00-\x7f]{{1,4}}|.")


def encode(text: str) -> list[int]:
    """Known words are a token each, other ASCII goes by four characters, the rest by byte."""
    ids: list[int] = []
    for piece in _PIECES.findall(text):
        known = _WORD_IDS.get(piece)
        if known is not None:
            ids.append(known)
        elif piece.isascii():
            ids.append(_packed(piece))
        else:
            ids.extend(FIRST_BYTE + byte for byte in piece.encode("utf-8", "surrogatepass"))
    return ids


def decode(ids: Iterable[int]) -> str:
    return b"".join(map(_bytes_of, ids)).decode("utf-8", "replace")


def text_of(token: int) -> str:
    """What a generated token adds to the text."""
    if FIRST_WORD <= token < FIRST_WORD + len(WORDS):
        return _WORD_TEXTS[token - FIRST_WORD]
    return decode([token])


def _packed(piece: str) -> int:
    """Seven bits a character, and how many there are."""
    value = sum(ord(character) << 7 * place for place, character in enumerate(piece))
    return FIRST_PACKED + value * 4 + len(piece) - 1


def _bytes_of(token: int) -> bytes:
    if token >= FIRST_PACKED:
        value, length = divmod(token - FIRST_PACKED, 4)
        return bytes(value >> 7 * place & 127 for place in range(length + 1))
    if token >= FIRST_WORD:
        word = token - FIRST_WORD
        return _WORD_TEXTS[word].encode() if word < len(WORDS) else b"?"
    if token >= FIRST_BYTE:
        return bytes([token - FIRST_BYTE])
    return b""
