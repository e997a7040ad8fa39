"""The per-request log: every figure of a report can be computed from it again."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest

from gateway.config import Limits
from gateway.scenario import PolicyEntry
from gateway.settings import ConfigError
from gateway.simulation.figures import Quantiles, distributions_of, figures_of, rank
from gateway.simulation.records import (
    REQUESTS,
    RUNS,
    Ended,
    LogWriter,
    Record,
    RunFacts,
    read_log,
)
from gateway.simulation.runs import Outcome, run_all
from policies.types import Kind
from tests.gateway.simulation.scenarios import CHAT, plan


def record(**fields: object) -> Record:
    values: dict[str, object] = {
        "id": "a",
        "workload": "chat",
        "kind": Kind.ONLINE,
        "arrival_us": 1_000_000,
        "prompt_tokens": 100,
        "output_tokens": 11,
        "ttft_target_us": 200_000,
        "tpot_target_us": 10_000,
        "window_us": 10_000_000,
        "ended": Ended.FINISHED,
        "first_us": 1_200_000,
        "last_us": 1_300_000,
        "generated": 11,
        "computed_tokens": 100,
    }
    return Record(**values | fields)  # type: ignore[arg-type]  # fields of one


FACTS = RunFacts(
    policy="p",
    load=1.0,
    seed=1,
    from_us=500_000,
    until_us=10_500_000,
    ended_us=11_000_000,
    gpu_s=22.0,
    requests=4,
)


def test_every_figure_of_every_run_is_computed_again_from_the_log(tmp_path: Path) -> None:
    short = PolicyEntry(name="short", limits=Limits(max_queued=1))
    batch = replace(CHAT, name="batch", kind=Kind.OFFLINE, arrivals="backlog", count=20)
    burst = replace(CHAT, rate=60.0)
    of = plan(
        burst,
        batch,
        seeds=(1, 2),
        policy=(short, PolicyEntry(name="wide")),
        warm_up_s=2.0,
        duration_s=5.0,
    )
    log = LogWriter(tmp_path)
    outcomes = run_all(of, processes=1, keep=log.write, tick=lambda share: None)
    log.close()
    again = [
        (facts, figures_of(facts, them), distributions_of(facts, them))
        for facts, them in read_log(tmp_path)
    ]
    assert again == [(it.facts, it.figures, it.distributions) for it in outcomes]
    assert any(figures.rejected for it in outcomes for figures in it.figures)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        log = LogWriter(tmp_path / name)
        run_all(plan(), processes=1, keep=log.write, tick=lambda share: None)
        log.close()
        found.append([(tmp_path / name / file).read_bytes() for file in (REQUESTS, RUNS)])
    assert found[0] == found[1]
    assert len(found[0][0].splitlines()) > 30


def test_processes_beside_each_other_change_nothing() -> None:
    of = plan(replace(CHAT, rate=2.0), seeds=(1, 2), duration_s=3.0)

    def outcomes(processes: int) -> list[Outcome]:
        return run_all(of, processes=processes, keep=None, tick=lambda share: None)

    assert outcomes(2) == outcomes(1)


@pytest.mark.parametrize(
    ("fields", "ttft", "tpot"),
    [
        ({}, True, True),
        ({"first_us": 1_200_001}, False, True),
        ({"last_us": 1_300_001}, True, False),
        ({"ended": Ended.UNFINISHED}, False, False),
        ({"ended": Ended.FAILED}, False, False),
        ({"ended": Ended.REJECTED, "first_us": None}, False, False),
        ({"generated": 1, "last_us": 1_200_000}, True, True),
    ],
)
def test_a_target_is_kept_by_those_who_end_inside_it(
    fields: dict[str, object], *, ttft: bool, tpot: bool
) -> None:
    it = record(**fields)
    assert (it.keeps_ttft, it.keeps_tpot, it.keeps_all) == (ttft, tpot, ttft and tpot)


def test_offline_work_keeps_its_window_alone() -> None:
    late = {"kind": Kind.OFFLINE, "tpot_target_us": 0, "first_us": 9_000_000}
    assert record(**late, last_us=11_000_000).keeps_all
    assert not record(**late, last_us=11_000_001).keeps_all


def test_attainment_is_a_share_of_all_that_were_submitted_after_the_warm_up() -> None:
    records = [
        record(),
        record(ended=Ended.REJECTED, first_us=None),
        record(ended=Ended.FAILED),
        record(arrival_us=499_999),
    ]
    (figures,) = figures_of(FACTS, records)
    assert (figures.submitted, figures.rejected, figures.failed) == (3, 1, 1)
    assert figures.attained == pytest.approx(1 / 3)
    assert figures.goodput_per_s == pytest.approx(0.1)


def backlog(*ends_us: int) -> list[Record]:
    queued = {"kind": Kind.OFFLINE, "arrival_us": 0, "first_us": 100_000, "window_us": 10**9}
    return [record(**queued, last_us=end_us) for end_us in ends_us]


@pytest.mark.parametrize(
    ("ends_s", "per_s"),
    [((3, 4, 5), 3 / 5), ((5, 10, 40), 2 / 10.5), ((20, 30, 40), 0.0)],
)
def test_the_goodput_of_a_backlog_is_what_ended_while_requests_came(
    ends_s: tuple[int, ...], per_s: float
) -> None:
    (figures,) = figures_of(FACTS, backlog(*(end_s * 1_000_000 for end_s in ends_s)))
    assert figures.goodput_per_s == pytest.approx(per_s)
    assert figures.attained == 1.0


def test_nothing_that_counts_is_no_share_at_all() -> None:
    (figures,) = figures_of(FACTS, [record(arrival_us=0)])
    assert (figures.submitted, figures.attained, figures.ttft_ms.p50) == (0, None, None)


@pytest.mark.parametrize(
    ("fields", "wasted"),
    [
        ({}, 0),
        ({"cached_tokens": 30, "computed_tokens": 70}, 0),
        ({"computed_tokens": 180, "attempts": 2}, 80),
        ({"ended": Ended.FAILED, "generated": 4}, 104),
        ({"ended": Ended.UNFINISHED}, 0),
    ],
)
def test_wasted_is_what_was_computed_for_nothing(fields: dict[str, object], wasted: int) -> None:
    assert record(**fields).wasted_tokens == wasted


def test_tokens_are_spread_between_the_first_and_the_last() -> None:
    it = record(first_us=1_000_000, last_us=2_000_000, generated=100)
    assert it.tokens_between(0, 1_250_000) == pytest.approx(25)
    assert it.tokens_between(0, 3_000_000) == pytest.approx(100)
    assert it.tokens_between(2_000_000, 3_000_000) == 0


def test_quantiles_are_nearest_ranks() -> None:
    assert Quantiles.of(range(1, 101)) == Quantiles(p50=50, p90=90, p99=99)
    assert rank([], 0.5) is None
    assert rank([7.0], 0.0) == 7.0


def test_whoever_stops_early_leaves_no_process_behind() -> None:
    of = plan(replace(CHAT, rate=2.0), seeds=tuple(range(9)), duration_s=3.0)

    def stop(facts: RunFacts, records: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_all(of, processes=2, keep=stop, tick=lambda share: None)
    assert active_children() == []


def test_a_request_that_fits_nowhere_is_told_from_a_process_too() -> None:
    of = plan(replace(CHAT, input_median=60_000, input_max=90_000), seeds=(1, 2))
    with pytest.raises(ConfigError, match="more than any server holds"):
        run_all(of, processes=2, keep=None, tick=lambda share: None)
