from __future__ import annotations

import errno
import socket
import ssl

import pytest

from backends.words import in_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"), "connection refused"),
        (OSError("Multiple exceptions: [Errno 111] a, [Errno 101] b"), "connection refused"),
        (OSError(errno.EADDRINUSE, "error while attempting to bind"), "address already in use"),
        (FileNotFoundError(2, "No such file", "t.csv"), "t.csv: no such file or directory"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (OSError("odd"), "odd"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("a reason"), "a reason"),
        (ssl.SSLError(1, "[SSL] wrong version number"), "[SSL] wrong version number"),
    ],
)  # fmt: skip
def test_trouble_is_told_in_words(error: BaseException, words: str) -> None:
    assert in_words(error) == words
