"""Other spellings of a host, each a server of its own to whoever knows servers by their address.

A decode server keeps its connection to a prefill server under the bootstrap address that a
request names, until heartbeats have missed that server or a request has waited for minutes. After
a restart that is quicker, or a role switched there and back, the connection leads nowhere, and
every pair over it is lost. Under another spelling of the same address it connects anew at once.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

SPELLINGS = 1 << 16
"""Larger than the number of spellings of nearly every host."""
LETTERS = 10
"""Of a name, the case of so many is changed: its end is left to those who match domains."""
ZEROS = 4
"""A hexadecimal number may begin with fewer than so many."""


@lru_cache(maxsize=1024)
def respelled(host: str, number: int) -> str:
    """The same host: 0 is as it was given; there are hundreds, then they come again."""
    if not number:
        return host
    bare = host.strip("[]")
    separator, parts = _alternatives(bare)
    words = []
    for choices in reversed(parts):
        number, chosen = divmod(number, len(choices))
        words.append(choices[chosen])
    spelled = separator.join(reversed(words))
    return host.replace(bare, spelled)


@lru_cache(maxsize=1024)
def canonical(host: str) -> str:
    """What all spellings of a host have in common."""
    bare = host.strip("[]").lower()
    if bare in {"localhost", "::1"}:
        return "127.0.0.1"
    try:
        return str(ip_address(bare))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(bare))
    except OSError:
        return bare


def _alternatives(host: str) -> tuple[str, list[tuple[str, ...]]]:
    """The last part changes first, but a name from its beginning."""
    try:
        address = ip_address(host)
    except ValueError:
        return "", list(_cases(host))
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return "", [(host,)]
        groups = address.exploded.split(":")
        return ":", [tuple(dict.fromkeys((f"{int(it, 16):x}", it))) for it in groups]
    return ".", [
        (it, *(f"0x{zeros * '0'}{int(it):x}" for zeros in range(ZEROS))) for it in host.split(".")
    ]


def _cases(name: str) -> Iterator[tuple[str, ...]]:
    left = LETTERS
    for letter in name:
        both = tuple(dict.fromkeys((letter, letter.swapcase())))
        yield both if left else (letter,)
        left -= left > 0 and len(both) > 1
