"""That offline work has no server of its own is said when it is so, once, and when it is over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.config import Classes, Colocation, Config, Online, Policies
from gateway.core import Core, Rules
from gateway.relaxed import RelaxedWatch
from policies.clock import VirtualClock
from policies.events import WorkerDown, WorkerDraining, WorkerGone, WorkerUp
from policies.pools import WithoutRelaxed
from policies.steps import Costs
from policies.types import Pool
from tests.gateway.talk import decode, prefill
from tests.policies.sites import COST

RELAXED = decode("r", pool=Pool.RELAXED)
NONE, AWAY, AGAIN = "no relaxed server decodes", "no relaxed server is in", "a relaxed server"


class Watched:
    def __init__(self, *workers: Any, rules: Rules | None = None, **sections: Any) -> None:
        self.core = Core(rules or Rules(), [prefill(), *workers])
        self.clock = VirtualClock()
        self.watch = RelaxedWatch(self.core, self.clock, Config(**sections))

    def said(self, *events: Any) -> list[dict[str, Any]]:
        with capture_logs() as told:
            self.core.handle(events, 0)
            self.watch.look()
        return [dict(one) for one in told]


@pytest.mark.parametrize("policy", WithoutRelaxed)
def test_a_fleet_without_a_relaxed_server_is_told_of_once(policy: WithoutRelaxed) -> None:
    site = Watched(decode("d"), colocation=Colocation(without_relaxed=policy))
    (line,) = site.said()
    assert line["event"].startswith(NONE)
    assert (line["without_relaxed"], line["log_level"]) == (policy.value, "info")
    assert site.said() == []


def test_with_pools_of_another_kind_nothing_is_said() -> None:
    assert Watched(decode("d"), policies=Policies(pools="none")).said() == []


@pytest.mark.parametrize(
    ("goes", "comes"),
    [
        (WorkerDown("r"), WorkerUp(RELAXED)),
        (WorkerDraining("r"), WorkerDraining("r", draining=False)),
    ],
)
def test_the_last_one_that_goes_is_told_of_and_so_is_the_first_that_is_back(
    goes: Any, comes: Any
) -> None:
    site = Watched(decode("d"), RELAXED)
    assert site.said() == []
    (line,) = site.said(goes)
    assert line["event"].startswith(AWAY)
    assert line["log_level"] == "warning"
    assert site.said() == []
    (line,) = site.said(comes)
    assert line["event"].startswith(AGAIN)


def test_one_of_two_may_go() -> None:
    site = Watched(decode("d"), RELAXED, decode("r2", pool=Pool.RELAXED))
    assert [*site.said(), *site.said(WorkerDown("r"))] == []
    assert [one["event"][:20] for one in site.said(WorkerGone("r2"))] == [AWAY[:20]]


def test_breakers_that_open_are_noticed() -> None:
    site = Watched(decode("d"), RELAXED)
    site.said()
    for _ in range(3):
        site.core.ledgers["r"].breaker.failed(0)
    (line,) = site.said()
    assert line["event"].startswith(AWAY)


@pytest.mark.parametrize(("tpot_ms", "lends"), [(5.0, False), (50.0, True)])
def test_strict_servers_that_could_lend_nothing_are_told_of(tpot_ms: float, *, lends: bool) -> None:
    rules = Rules(costs=Costs(default=COST))
    site = Watched(decode("d"), rules=rules, classes=Classes(online=Online(tpot_ms=tpot_ms)))
    told = site.said()[1:]
    assert len(told) == (0 if lends else 1)
    if told:
        assert told[0]["step_ms"] > told[0]["lends_below_ms"] == 0.9 * tpot_ms
    assert site.said() == []


def test_other_rules_are_a_reason_to_say_it_again() -> None:
    site = Watched(decode("d"))
    site.said()
    config = replace(Config(), colocation=Colocation(without_relaxed=WithoutRelaxed.HOLD))
    site.watch.adopt(config)
    (line,) = site.said()
    assert line["without_relaxed"] == "hold"


def test_it_looks_twice_a_second_until_it_is_closed() -> None:
    site = Watched(decode("d"), RELAXED)
    with capture_logs() as told:
        site.watch.start()
        site.core.handle([WorkerDown("r")], 0)
        site.clock.run(0.6)
        site.watch.close()
        site.core.handle([WorkerUp(RELAXED)], 0)
        site.clock.run(5.0)
    assert [one["event"][:20] for one in told] == [AWAY[:20]]
