"""Whether the store is tested on PostgreSQL, too: where its programs are installed."""

from __future__ import annotations

import os

from benchmarks.postgres import is_installed

LEFT_OUT = (
    "left out: the batch store's tests on PostgreSQL, whose initdb is not installed "
    "(apt-get install postgresql)"
)


def is_included() -> bool:
    """Whether it is installed, or its absence is to be a failure."""
    return os.environ.get("SLACKWATER_REQUIRE_POSTGRES") == "1" or is_installed()
