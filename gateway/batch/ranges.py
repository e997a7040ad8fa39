"""Which bytes of a file a client wants: RFC 9110, for one range."""

from __future__ import annotations

import re
from typing import Final

from gateway.errors import ApiError, Code

_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def wanted(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """First byte and the one after the last. None: all of it, as for what is not understood."""
    match = None if header is None else _RANGE.fullmatch(header.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size_bytes - int(last)), size_bytes
    else:
        start, stop = int(first), size_bytes if not last else min(int(last) + 1, size_bytes)
        if last and int(last) < int(first):
            return None
    if start >= stop:
        message = f"the file has {size_bytes} bytes"
        raise ApiError(Code.RANGE_NOT_SATISFIABLE, message)
    return start, stop
