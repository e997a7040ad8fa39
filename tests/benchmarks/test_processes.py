from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.processes import (
    DidNotStart,
    all_stopped,
    cpu_s,
    free_port,
    start,
    ticked_cpu_s,
    tree,
    usage_of,
    wait_until_listening,
)


def test_cpu_time_is_the_one_that_the_process_itself_sees() -> None:
    before, mine = cpu_s(os.getpid()), time.process_time()
    sum(range(300_000))
    assert cpu_s(os.getpid()) - before == pytest.approx(time.process_time() - mine, abs=0.005)
    assert ticked_cpu_s(os.getpid()) == pytest.approx(cpu_s(os.getpid()), abs=0.05)


def test_memory_is_that_of_the_whole_tree() -> None:
    with all_stopped() as running:
        child = start("child", [sys.executable, "-c", "import time; print(1); time.sleep(60)"])
        running.append(child)
        assert child.pid in tree(os.getpid())
        assert usage_of(os.getpid()).rss_mib > 1
    assert child.ended


def test_a_program_that_ends_at_once_is_reported_with_its_last_words() -> None:
    with all_stopped() as running:
        child = start("child", [sys.executable, "-c", "raise SystemExit('no luck today')"])
        running.append(child)
        with pytest.raises(DidNotStart, match="no luck today"):
            wait_until_listening(child, free_port())
