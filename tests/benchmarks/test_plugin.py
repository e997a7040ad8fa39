"""The simulated side of benchmarks.plugin, and how it measures what rest costs."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import repeat
from typing import cast

import pytest

from benchmarks.plugin_found import Effort, Found
from benchmarks.plugin_mixed import (
    Answer,
    Asker,
    Held,
    Mixed,
    Targets,
    again,
    mingled,
    seen,
    spaced,
    told_apart,
    told_of,
)
from benchmarks.plugin_model import AsMeasured, Row, circled, played
from benchmarks.plugin_overhead import ROUNDS, resting_us
from benchmarks.plugin_site import Site, Stream
from policies.step_line import SeenStep, StepLine

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


def test_in_a_circle_the_next_comes_some_time_after_the_one_before_and_halts_the_others() -> None:
    times = AsMeasured(LINE, joins_s=repeat(0.05))
    rows = [replace(ONLINE, tokens=11)] * 9
    told = circled(times, [rows, rows], "all", 4, again_s=repeat(0.2), until_s=1.0)
    first, second = told[0][:2]
    assert second.times_s[0] - first.times_s[-1] == pytest.approx(0.25, abs=0.06)
    assert [len(own) for own in told] == [3, 3]
    assert [it.has_ended for it in told[0]] == [True, True, True]


def test_each_client_counts_alike_and_an_answer_that_has_not_ended_is_none() -> None:
    askers = [Asker(prompt=[1], is_tight=True), Asker(prompt=[2], is_tight=False)]
    quick = Answer([0.0, 0.1, 0.2], 3, has_ended=True)
    late = Answer([0.0, 0.3, 0.6], 3, has_ended=True)
    begun = Answer([0.0, 0.1], 2, has_ended=False)
    got = seen(askers, [[quick, quick, late], [late, begun]], Targets(100.0, 300.0), 0.0, 2.0)
    assert got.met == pytest.approx((2 / 3 + 1) / 2)
    assert got.per_s == pytest.approx((4 * 3 + 2) / 2)
    assert got.gap_s == pytest.approx(1.9)  # nothing since, to whom was not served to the end


def test_simulated_answers_are_counted_as_real_ones() -> None:
    told = played(LINE, [ONLINE], "all", hold_steps=4)[0]
    assert told_of(told).has_ended
    assert told_of(told).tpot_ms == pytest.approx(told.tpot_ms)


def test_a_step_that_somebody_joined_before_tells_for_how_long_all_were_halted() -> None:
    usual = [SeenStep(n, n * 1_000, LINE.step_us(n, n * 1_000)) for n in (4, 4, 3, 3)]
    slow = SeenStep(5, 5_000, LINE.step_us(5, 5_000) + 8_000)
    kept, joining = told_apart([*usual, slow])
    assert kept == usual[1:]
    assert [it.joined for it in joining] == [2]
    held = Held.of(LINE, [*usual, slow], [0.2])
    assert held.joins_s == pytest.approx([0.004])
    assert held.ratios == pytest.approx([1.0] * 3)


def test_what_was_slow_for_a_while_is_so_again() -> None:
    got = again([1.0, 2.0, 3.0], random.Random(1))
    drawn = [next(got) for _ in range(6)]
    assert drawn[:3] == drawn[3:]
    assert "".join(f"{it:.0f}" for it in drawn[:3]) in "123123"


def test_steps_that_are_held_up_take_longer_than_they_are_predicted_to() -> None:
    times = AsMeasured(LINE, held=repeat(1.5))
    told = circled(times, [[ONLINE]], "all", 4, again_s=repeat(0.0), until_s=10.0)
    plain = played(LINE, [ONLINE], "all", hold_steps=4)
    assert told[0][0].tpot_ms == pytest.approx(1.5 * plain[0].tpot_ms, rel=0.02)


def test_any_first_few_prompts_are_about_as_long_as_all() -> None:
    prompts = mingled(spaced((2_500, 3_600), 12))
    assert sorted(prompts) == spaced((2_500, 3_600), 12)
    for few in (3, 6, 9):
        assert sum(prompts[:few]) / few == pytest.approx(3_050, rel=0.1)


@pytest.mark.parametrize("heard", [True, False])
def test_rest_costs_something(heard: bool) -> None:  # noqa: FBT001
    rounds = resting_us(heard=heard, steps=10_000)
    assert len(rounds) == ROUNDS
    assert 0 < min(rounds) < 1_000


def test_an_answer_that_stopped_short_has_failed() -> None:
    assert Stream(limit=3).has_failed
    assert Stream(limit=3, events=[(0.1, 1), (0.2, 2)]).has_failed
    assert not Stream(limit=3, events=[(0.1, 1), (0.3, 3)]).has_failed


def test_by_the_line_a_slower_machine_is_no_loss_of_the_rule() -> None:
    mixed = Mixed(cast("Site", None), Effort(runs=1), Found())
    fast = [SeenStep(n, 1_000 * n, LINE.step_us(n, 1_000 * n)) for n in (4, 4, 2, 2)]
    slow = [step._replace(took_us=1.5 * step.took_us) for step in fast]
    mixed.steps = {(1.0, "all"): [fast, fast], (1.0, "slack"): [slow, fast[:2]]}
    both, fuller = mixed.by_the_line(LINE, 1.0)
    assert both == pytest.approx(1.0)
    assert fuller > 1.1
