"""How trouble with files and sockets is told: in words, without error numbers."""

from __future__ import annotations

import os
import re
import ssl

TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
"""How a value of a file is called."""
_NUMBERED = re.compile(r"\[Errno (\d+)\]")


def in_words(error: BaseException) -> str:
    """What went wrong, and with which file where it was one."""
    # TLS has numbers of its own.
    if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
        return str(error) or type(error).__name__
    words = _reason(error)
    return f"{error.filename}: {words}" if error.filename else words


def _reason(error: OSError) -> str:
    """Of several addresses of one name, the first one's: asyncio tells them in one text."""
    number = error.errno
    if number is None and (found := _NUMBERED.search(str(error))):
        number = int(found[1])
    if number is not None and number > 0:
        return os.strerror(number).lower()
    return error.strerror or str(error) or type(error).__name__
