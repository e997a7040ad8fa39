"""What the model says: the next token follows from every token before it, and from nothing else."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from zlib import crc32

EOS = 2
FIRST_WORD = 259
WORDS = tuple(a + b + c for a in "bdfgklmn" for b in "aeio" for c in "lmnrstkp")
"""Generated text is made of these, each after a space: about four characters a token."""

_PACKED = tuple((FIRST_WORD + index).to_bytes(4, "little") for index in range(len(WORDS)))


def pack(ids: Iterable[int]) -> bytes:
    """Four bytes a token: cheap to slice, to compare and to hash."""
    return array("I", ids).tobytes()


def unpack(packed: bytes) -> list[int]:
    return array("I", packed).tolist()


def _mix(state: int) -> int:
    state = ((state ^ (state >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return state ^ (state >> 12)


class Script:
    """The tokens that follow a prompt, written as far as somebody has read."""

    __slots__ = ("_eos_every", "_state", "ids")

    def __init__(self, prompt: bytes, eos_every: int) -> None:
        self._state = crc32(prompt)
        self._eos_every = eos_every
        self.ids: list[int] = []

    def first(self, count: int) -> list[int]:
        while len(self.ids) < count:
            self._write(_mix(self._state))
        return self.ids[:count]

    def at(self, position: int) -> int:
        while len(self.ids) <= position:
            self._write(_mix(self._state))
        return self.ids[position]

    def _write(self, mixed: int) -> None:
        if mixed // 256 % self._eos_every == 0:
            self.ids.append(EOS)
            self._state = crc32(b"\x02\0\0\0", self._state)
        else:
            self.ids.append(FIRST_WORD + mixed % 256)
            self._state = crc32(_PACKED[mixed % 256], self._state)
