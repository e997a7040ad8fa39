"""The simulated side of benchmarks.plugin, and how it measures what rest costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.plugin_model import Row, played
from benchmarks.plugin_overhead import resting_us
from policies.step_line import StepLine

LINE = StepLine(2_000.0, 500.0, 0.3)
ONLINE = Row(prompt_tokens=600, tokens=60)
OFFLINE = Row(prompt_tokens=3_000, tokens=120, online=False)


def test_where_all_step_a_token_takes_what_the_line_says() -> None:
    told = played(LINE, [ONLINE] * 4, "all", hold_steps=4)
    mean_us = LINE.step_us(4, 4 * (600 + 30))
    assert [it.tpot_ms for it in told] == pytest.approx([mean_us / 1e3] * 4, rel=0.02)


def test_a_target_is_kept_by_leaving_offline_requests_out() -> None:
    rows = [ONLINE] * 4 + [OFFLINE] * 4
    everyone = played(LINE, rows, "all", hold_steps=4)[0].tpot_ms
    rows = [replace(ONLINE, tpot_ms=0.8 * everyone)] * 4 + [OFFLINE] * 4
    told = played(LINE, rows, "online-first", hold_steps=4)
    assert 0.6 * everyone < told[0].tpot_ms <= 0.8 * everyone
    assert {len(it.times_s) for it in told[4:]} == {119}  # the first one comes with the prompt


def test_rest_costs_something() -> None:
    assert 0 < resting_us(500) < 1_000
