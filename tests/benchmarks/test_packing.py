"""What benchmarks.packing plays, counts and checks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest

import benchmarks.packing as bench
from benchmarks.packing import (
    CONDITIONS,
    RULES,
    STOCK,
    TIGHTER,
    Bench,
    Condition,
    Key,
    Misled,
    Place,
    Won,
    clients,
    misled,
    told,
)
from benchmarks.plugin_mixed import KNEE, TIGHT, UNTARGETED, Answer, Targets, seen
from benchmarks.report import Report
from policies.clock import VirtualClock
from policies.packing import PACKING, MostKept, Running, StepUs
from policies.step_line import StepLine

HOST = next(it for it in CONDITIONS if it.name == "with the host's 4 ms")


def place(condition: Condition = HOST, load: float = 1.0) -> Place:
    tight, loose = clients()
    return Place(condition, load, [*tight, *loose[: round(load * KNEE)]])


def test_each_condition_has_a_name_and_steps_of_its_own() -> None:
    assert len({it.name for it in CONDITIONS}) == len(CONDITIONS)
    assert len({replace(it, name="", steps="") for it in CONDITIONS}) == len(CONDITIONS)


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda it: it.name)
def test_a_step_is_never_much_shorter_than_the_line_and_the_same_seed_draws_the_same(
    condition: Condition,
) -> None:
    one, two = (
        list(islice(condition.ratios(random.Random("a"), VirtualClock()), 2_000)) for _ in range(2)
    )
    assert one == two
    assert 0.97 <= min(one) <= max(one) <= 2.2


def test_a_spell_is_slow_for_seconds_and_at_the_same_ones_however_many_steps_are_taken() -> None:
    def paces(steps_a_spell: int) -> list[float]:
        clock = VirtualClock()
        ratios = bench.in_spells(random.Random("a"), clock)
        fastest = []
        for number in range(40):
            clock.run(number * bench.SPELL_S)
            fastest.append(min(islice(ratios, steps_a_spell)))
        return fastest

    few, many = paces(20), paces(60)
    assert [round(it, 1) for it in few] == [round(it, 1) for it in many]
    assert {round(it, 1) for it in few} == {1.0, 1.1, 1.2}


def test_seconds_beside_the_line_come_out_in_the_pace_of_stock() -> None:
    def tight_ms(condition: Condition) -> float:
        answers = place(condition).play(STOCK, "0", UNTARGETED, 10.0)
        return seen(place().askers, answers, UNTARGETED, 0.0, 10.0).tight_ms

    plain = tight_ms(HOST)
    assert tight_ms(replace(HOST, unseen=1.13)) == pytest.approx(1.13 * plain, rel=0.03)
    assert tight_ms(replace(HOST, join_s=0.02)) > 1.03 * plain


def test_a_window_is_the_same_again_and_another_with_another_seed() -> None:
    def tokens(seed: str) -> list[list[int]]:
        answers = place().play(STOCK, seed, UNTARGETED, 5.0)
        return [[it.tokens for it in own] for own in answers]

    assert tokens("0") == tokens("0")
    assert tokens("0") != tokens("1")


def test_clients_begin_one_after_another() -> None:
    firsts_s = sorted(own[0].times_s[0] for own in place().play(STOCK, "0", UNTARGETED, 5.0))
    assert len(firsts_s) == TIGHT + KNEE
    assert 0.5 < firsts_s[-1] - firsts_s[0] < bench.STAGGER_S + 0.5


def test_stock_steps_the_same_whatever_the_targets_and_a_rule_does_not() -> None:
    tight = Targets(45.0, 135.0)

    def answers(rule: str, targets: Targets) -> list[list[Answer]]:
        return place().play(rule, "0", targets, 5.0)

    assert answers(STOCK, tight) == answers(STOCK, UNTARGETED)
    assert answers("most-kept", tight) != answers(STOCK, tight)


def test_whoever_is_misled_takes_steps_for_shorter_than_they_are() -> None:
    predicted: list[float] = []

    class Asks:
        by_longest = True

        def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
            predicted.append(step_us(2, 300, 200))
            return [0]

    packing = Misled(Asks(), 1.25)
    line = StepLine(1_000.0)
    assert packing.choose([Running(1, 0, 0.0, 0.0)], line.step_us) == [0]
    assert predicted == pytest.approx([800.0])
    assert packing.by_longest


def test_the_engine_finds_a_misled_rule_by_name_for_as_long_as_it_is_played() -> None:
    before = dict(PACKING)
    with misled("most-kept", 1.13) as name:
        assert PACKING[name] == Misled(MostKept(), 1.13)
    assert before == PACKING
    with misled("most-kept", 1.0) as name:
        assert name == "most-kept"


def test_every_rule_can_be_asked_for() -> None:
    assert set(RULES) <= set(PACKING)
    with pytest.raises(SystemExit):
        bench.main(["--seeds", "0"])


def filled(*, rule: str = "most-kept", load: float = 2.0) -> Bench:
    """Two seeds of two conditions, each with nothing won and nothing lost."""
    found = Bench(rule, 2, 10.0, CONDITIONS[:2], (load,))
    for condition in found.conditions:
        found.tight_ms[condition.name] = 50.0
        for tighter in TIGHTER:
            found.won[Key(condition.name, tighter, load)] = [Won(2.0, 1.0, 0.5)] * 2
    return found


def missed(found: Bench) -> list[str]:
    report = Report(title="")
    found.tell(report)
    return [it.name for it in report.checks if not it.ok]


def test_what_is_won_everywhere_at_no_cost_is_kept() -> None:
    assert missed(filled()) == []
    assert missed(filled(load=0.5)) == []


@pytest.mark.parametrize(
    ("won", "what"),
    [
        (Won(-1.1, 1.0, 0.5), "points won, 2 of the knee, least of all conditions"),
        (Won(2.0, 0.94, 0.5), "tokens/s over stock, 2 of the knee, least of all"),
        (Won(2.0, 1.0, 2.6), "longest wait, 2 of the knee"),
    ],
)
def test_one_condition_that_loses_is_a_miss(won: Won, what: str) -> None:
    found = filled()
    last = Key(CONDITIONS[1].name, list(TIGHTER)[1], 2.0)
    found.won[last] = [won, won]
    assert what in missed(found)


def test_at_the_knee_and_above_something_has_to_be_won_with_each_set_of_targets() -> None:
    for load, tighter in ((1.0, ""), (2.0, ", targets 6 % tighter"), (0.5, "")):
        found = filled(load=load)
        for key in found.at(load, tighter):
            found.won[key] = [Won(0.5, 1.0, 0.5)] * 2
        name = f"points won, {load:g} of the knee, mean of all conditions{tighter}"
        assert missed(found) == ([name] if load >= 1 else [])


def test_a_cell_tells_the_mean_and_the_worst_seed() -> None:
    cell = told([Won(-2.0, 0.99, 0.4), Won(10.0, 1.0, 0.9)])
    assert cell == "+4.0 (-2 to +10)\n99.5 %, 0.90 s"


def test_a_small_bench_fills_every_cell() -> None:
    found, advanced = Bench("most-kept", 1, 4.0, CONDITIONS[:1], (1.0,)), []
    found.run(lambda: advanced.append(1))
    assert len(advanced) == found.total == 2
    assert set(found.won) == {Key(CONDITIONS[0].name, it, 1.0) for it in TIGHTER}
    assert 30 < found.tight_ms[CONDITIONS[0].name] < 60
