"""Conversations in which online work takes places back, and offline work takes what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from gateway.config import Config
from gateway.core import Rules
from gateway.rulebook import rules_of
from policies.colocation import Colocated
from policies.displace import ByCost
from policies.events import (
    Finished,
    FirstToken,
    LoadReport,
    Preempted,
    PrefillDone,
    Progress,
    Reason,
    WorkerDown,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from policies.ledger import Ledger
from policies.order import Fcfs
from policies.pools import ByLatency, WithoutRelaxed
from policies.preempt import AbortRule, ForSlack, GiveWay, Stay, Victim, Victims
from policies.retry import RetryRule
from policies.steps import Costs
from policies.types import Kind, Pool, Worker
from tests.gateway.talk import SECOND, Talk, broke, decode, load, offline, online, prefill
from tests.policies.sites import COST

RULES = Rules(
    order=Fcfs(),
    pools=ByLatency(lends=True),
    admit=Colocated(tpot_us=50_000),
    give_way=ForSlack(tpot_us=50_000, pulls=True),
    costs=Costs(default=COST),
)
LONG = 60_000
"""Prompt tokens that keep the server for longer than half an online target."""


def relaxed(name: str = "r", **fields: Any) -> Worker:
    return decode(name, pool=Pool.RELAXED, **fields)


def fleet(**strict: Any) -> list[Worker]:
    return [prefill(chunk_tokens=8192), decode("d", **strict), relaxed()]


def running(*names: str, fleet: list[Worker], rules: Rules = RULES, **fields: Any) -> Talk:
    """Offline jobs that decode, each sent a little later than the one before."""
    talk = Talk(fleet, rules)
    for at_us, name in enumerate(names):
        talk.arrive(offline(name, at_us=at_us, **fields), at_us=at_us)
        talk.say(PrefillDone(name), FirstToken(name))
    return talk


def strict_only(**fields: Any) -> list[Worker]:
    return [prefill(chunk_tokens=8192), decode("d", **fields)]


# Prefill.


def test_a_long_offline_prompt_makes_way_for_an_online_one() -> None:
    talk = Talk(fleet(), RULES)
    assert talk.arrive(offline("a", LONG)) == [("go", "a", "p", "r")]
    assert talk.arrive(online("b")) == [("preempt", "a", "online_prefill")]
    assert talk.say(Preempted("a")) == [("go", "b", "p", "d")]
    assert talk.say(PrefillDone("b")) == [("go", "a", "p", "r", "requeued")]


def test_a_prompt_that_is_sent_behind_others_has_them_removed_just_as_well() -> None:
    talk = Talk(fleet(), RULES)
    talk.arrive(offline("a", 6000), offline("b", 6000))
    urgent = online("c", deadline_us=300_000)
    assert talk.arrive(urgent) == [("go", "c", "p", "d"), ("preempt", "b", "online_prefill")]
    assert talk.say(Preempted("b")) == [("go", "b", "p", "r", "requeued")]


def test_an_online_prompt_that_is_in_time_displaces_nobody() -> None:
    talk = Talk(fleet(), RULES)
    talk.arrive(offline("a", 5000))
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]


def test_without_preemption_it_waits() -> None:
    talk = Talk(fleet(), replace(RULES, give_way=Stay()))
    talk.arrive(offline("a", LONG))
    assert talk.arrive(online("b")) == []


def test_an_offline_prompt_goes_behind_no_online_one_that_would_delay_the_next() -> None:
    talk = Talk(fleet(), RULES)
    talk.arrive(online("a", 8000))
    assert talk.arrive(offline("b", 8000)) == [("go", "b", "p", "r")]
    assert talk.arrive(offline("c", LONG)) == []
    assert talk.say(PrefillDone("a"), PrefillDone("b")) == [("go", "c", "p", "r")]


@pytest.mark.parametrize(
    ("give_way", "said"), [(ForSlack(), []), (Stay(), [("reject", "c", "deadline_hopeless")])]
)
def test_no_online_prompt_is_hopeless_for_what_gives_way(
    give_way: GiveWay, said: list[tuple[Any, ...]]
) -> None:
    rules = replace(RULES, give_way=give_way, aborts=AbortRule(per_s=0, burst=0))
    talk = Talk(fleet(), rules)
    talk.arrive(offline("a", 600_000))
    talk.arrive(online("b"))
    assert talk.arrive(online("c")) == said


# Decode.


def test_an_online_job_takes_a_seat_back_from_the_newest() -> None:
    talk = running("a", "b", fleet=strict_only(max_running=2))
    assert talk.arrive(online("c", at_us=9)) == [("preempt", "b", "online_decode")]
    assert talk.say(Preempted("b", 3)) == [("go", "c", "p", "d")]
    assert talk.say(PrefillDone("c"), Finished("a", 5)) == [("go", "b", "p", "d", "resume")]


def test_an_online_job_takes_memory_back_from_as_many_as_it_takes() -> None:
    talk = running("a", "b", "c", fleet=strict_only(kv_tokens=1000))
    assert talk.arrive(online("d", 450, at_us=9)) == [
        ("preempt", "c", "online_decode"),
        ("preempt", "b", "online_decode"),
    ]
    assert talk.say(Preempted("c")) == []
    assert talk.say(Preempted("b")) == [("go", "d", "p", "d")]


def test_while_they_leave_nobody_else_has_to() -> None:
    talk = running("a", "b", "c", fleet=strict_only(max_running=3))
    assert talk.arrive(online("d"), at_us=SECOND) == [("preempt", "c", "online_decode")]
    assert talk.say(LoadReport("d", load()), at_us=2 * SECOND) == []
    assert talk.say(Preempted("c")) == [("go", "d", "p", "d")]


def test_one_online_job_displaces_no_more_than_it_may() -> None:
    rules = replace(RULES, aborts=AbortRule(per_request=1))
    talk = running("a", "b", "c", fleet=strict_only(kv_tokens=1000), rules=rules)
    assert talk.arrive(online("d", 450, at_us=9)) == [("preempt", "c", "online_decode")]
    assert talk.say(Preempted("c"), at_us=SECOND) == []


def test_a_budget_that_is_spent_stops_all_preemption() -> None:
    rules = replace(RULES, aborts=AbortRule(per_s=0, burst=1))
    talk = running("a", "b", fleet=strict_only(max_running=2), rules=rules)
    assert talk.arrive(online("c", at_us=9)) == [("preempt", "b", "online_decode")]
    assert talk.say(Preempted("b")) == [("go", "c", "p", "d")]
    talk.say(PrefillDone("c"))
    assert talk.arrive(online("e")) == []


def test_steps_that_grow_too_long_shed_the_newest() -> None:
    talk = running("a", "b", fleet=strict_only(), max_tokens=900_000)
    talk.arrive(online("c", at_us=9))
    talk.say(PrefillDone("c"), FirstToken("c"))
    assert talk.say(Progress((("a", 300_000), ("b", 300_000)))) == []
    assert talk.say(Progress((("a", 700_000), ("b", 700_000)))) == [("preempt", "b", "step_time")]


def test_an_online_job_whose_steps_would_be_too_long_sheds_at_once() -> None:
    talk = running("a", fleet=strict_only(), max_tokens=900_000)
    talk.say(Progress((("a", 1_400_000),)))
    assert talk.arrive(online("b")) == [("go", "b", "p", "d"), ("preempt", "a", "step_time")]


def test_a_pace_below_the_target_sheds_where_steps_are_not_predicted() -> None:
    rules = replace(RULES, costs=Costs())
    talk = running("a", fleet=strict_only(), rules=rules)
    talk.arrive(online("b"))
    talk.say(PrefillDone("b"), FirstToken("b"))
    said = [talk.say(Progress((("b", tokens),)), at_us=tokens * 60_000) for tokens in range(1, 12)]
    assert [("preempt", "a", "step_time")] in said
    assert talk.core.accounts.preemptions[Kind.OFFLINE, "d", Reason.STEP_TIME] == 1


# Whose servers.


def test_offline_work_fills_relaxed_servers_before_it_borrows() -> None:
    talk = Talk([prefill(), decode("d"), relaxed(max_running=2)], RULES)
    where = [talk.arrive(offline(name))[0][3] for name in "abc"]
    assert where == ["r", "r", "d"]


def test_nothing_is_lent_by_a_server_whose_steps_are_unknown() -> None:
    rules = replace(RULES, costs=Costs())
    talk = Talk([prefill(), decode("d"), relaxed(max_running=1)], rules)
    assert talk.arrive(offline("a"), offline("b")) == [("go", "a", "p", "r")]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (WithoutRelaxed.SHARE, [("go", "a", "p", "d")]),
        (WithoutRelaxed.HOLD, []),
        (WithoutRelaxed.REJECT, [("reject", "a", "no_relaxed_worker")]),
    ],
)
def test_without_a_relaxed_server_offline_work_does_as_it_is_told(
    policy: WithoutRelaxed, said: list[tuple[Any, ...]]
) -> None:
    rules = replace(RULES, pools=ByLatency(lends=True, without_relaxed=policy))
    talk = Talk(strict_only(), rules)
    assert talk.arrive(offline("a")) == said
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]
    if policy is WithoutRelaxed.HOLD:
        assert talk.say(WorkerUp(relaxed())) == [("go", "a", "p", "r")]


REFUSED = ("reject", "a", "no_relaxed_worker")
REJECTS = replace(RULES, pools=ByLatency(lends=True, without_relaxed=WithoutRelaxed.REJECT))


def tripped(talk: Talk) -> None:
    for _ in range(talk.core._rules.breaker.failures):
        talk.core.ledgers["r"].breaker.failed(talk.now_us)


GONE: dict[str, Callable[[Talk], object]] = {
    "it is drained": lambda talk: talk.say(WorkerDraining("r")),
    "it is silent": lambda talk: talk.say(WorkerDown("r")),
    "its breaker is open": tripped,
}


@pytest.mark.parametrize("costs", [Costs(), RULES.costs], ids=["nothing lent", "lent"])
@pytest.mark.parametrize("way", GONE)
def test_where_offline_work_is_to_be_refused_an_arrival_is_while_no_relaxed_server_is_in_rotation(
    way: str, costs: Costs
) -> None:
    talk = Talk(fleet(), replace(REJECTS, costs=costs))
    GONE[way](talk)
    assert talk.arrive(offline("a")) == [REFUSED]
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]
    assert len(talk.core) == 1


@pytest.mark.parametrize("online_waits", [False, True])
@pytest.mark.parametrize("gone", [WorkerDown("r"), WorkerDraining("r"), WorkerGone("r")])
def test_offline_work_that_waits_is_refused_when_the_last_relaxed_server_goes(
    gone: WorkerDown | WorkerDraining | WorkerGone, *, online_waits: bool
) -> None:
    rules = replace(REJECTS, costs=Costs(), give_way=Stay())
    talk = Talk([prefill(), decode("d", max_running=1), relaxed(max_running=1)], rules)
    for job in (offline("r0"), online("o0")):
        talk.arrive(job)
        talk.say(PrefillDone(job.id), FirstToken(job.id))
    assert talk.arrive(offline("a")) == []
    if online_waits:
        assert talk.arrive(online("o1")) == []
    assert talk.say(gone) == [REFUSED]
    assert talk.say(Finished("o0", 1)) == ([("go", "o1", "p", "d")] if online_waits else [])


HOLDS = replace(RULES, pools=ByLatency(lends=True, without_relaxed=WithoutRelaxed.HOLD))
BACK: dict[str, Callable[[Talk], Any]] = {
    "it is drained": lambda talk: talk.say(WorkerDraining("r", draining=False)),
    "it is silent": lambda talk: talk.say(WorkerUp(relaxed())),
    "its breaker is open": Talk.sleep,
}


@pytest.mark.parametrize("costs", [Costs(), RULES.costs], ids=["nothing lent", "lent"])
@pytest.mark.parametrize("way", GONE)
def test_held_offline_work_waits_for_a_relaxed_server_whatever_strict_ones_could_lend(
    way: str, costs: Costs
) -> None:
    talk = Talk(fleet(), replace(HOLDS, costs=costs))
    GONE[way](talk)
    assert talk.arrive(offline("a")) == []
    assert talk.say(LoadReport("d", load())) == []
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]
    assert talk.say(PrefillDone("b"), FirstToken("b"), Finished("b", 1)) == []
    assert BACK[way](talk) == [("go", "a", "p", "r")]


def test_a_relaxed_server_that_is_full_lets_strict_ones_lend_to_held_work() -> None:
    talk = Talk([prefill(), decode("d"), relaxed(max_running=1)], HOLDS)
    assert talk.arrive(offline("a"), offline("b")) == [("go", "a", "p", "r"), ("go", "b", "p", "d")]


def test_offline_work_whose_last_relaxed_server_fails_three_times_is_refused() -> None:
    rules = replace(REJECTS, costs=Costs(), retry=RetryRule(backoff_us=0))
    talk = Talk([prefill(), decode("d"), relaxed(max_running=1)], rules)
    talk.arrive(offline("a"), offline("b"))
    said = [talk.say(broke("a", "r")) for _ in range(3)]
    assert [("reject", name, "no_relaxed_worker") for name in "ab"] == sorted(said[-1])
    assert len(talk.core) == 0


def test_offline_work_waits_for_relaxed_servers_that_are_full() -> None:
    rules = replace(REJECTS, costs=Costs())
    talk = Talk([prefill(), decode("d"), relaxed(max_running=1)], rules)
    assert talk.arrive(offline("b"), offline("a")) == [("go", "a", "p", "r")]
    talk.say(PrefillDone("a"), FirstToken("a"))
    assert talk.say(Finished("a", 1)) == [("go", "b", "p", "r")]


def test_of_two_relaxed_servers_one_is_enough_and_one_that_is_back_is_used() -> None:
    talk = Talk([*fleet(), relaxed("r2")], replace(REJECTS, costs=Costs()))
    assert talk.say(WorkerDown("r")) == []
    assert talk.arrive(offline("b")) == [("go", "b", "p", "r2")]
    talk.say(PrefillDone("b"), FirstToken("b"), WorkerDown("r2"))
    assert talk.arrive(offline("a")) == [REFUSED]
    talk.say(WorkerUp(relaxed()))
    assert talk.arrive(offline("c")) == [("go", "c", "p", "r")]


def test_what_no_server_could_do_is_not_put_down_to_the_relaxed_ones() -> None:
    talk = Talk([decode("d")], REJECTS)
    assert talk.arrive(offline("a")) == [("reject", "a", "no_worker")]


@pytest.mark.parametrize("gone", [WorkerDown("r"), WorkerDraining("r")])
def test_offline_work_borrows_when_the_last_relaxed_server_goes(
    gone: WorkerDown | WorkerDraining,
) -> None:
    """Of these strict servers nobody knows the hardware, so while there is a relaxed one they lend
    nothing."""
    talk = Talk([prefill(), decode("d"), relaxed(max_running=1)], rules_of(Config()))
    assert talk.arrive(offline("a")) == [("go", "a", "p", "r")]
    talk.say(PrefillDone("a"), FirstToken("a"))
    assert talk.arrive(offline("b")) == []
    assert talk.say(gone) == [("go", "b", "p", "d")]


def test_in_one_pool_offline_work_goes_to_strict_servers_too() -> None:
    talk = Talk([prefill(), decode("d"), relaxed(max_running=1)], Rules())
    talk.arrive(offline("a"))
    talk.say(PrefillDone("a"), FirstToken("a"))
    talk.arrive(offline("b"))
    talk.say(PrefillDone("b"), FirstToken("b"))
    assert {e.decodes for e in talk.core.ledgers.values() if e.worker.name != "p"} == {1}


def crowded() -> Talk:
    """A relaxed server whose steps are long beside a strict one with room."""
    crowd = [f"{i:03}" for i in range(120)]
    talk = Talk(fleet(), replace(RULES, admit=Colocated(tpot_us=50_000, gate=False)))
    for name in crowd:
        talk.arrive(offline(name, 3000, max_tokens=4000))
        talk.say(PrefillDone(name), FirstToken(name))
    talk.say(Progress(tuple((name, 5) for name in crowd)))
    talk.say(Finished(crowd[0], 3000))
    return talk


def test_a_strict_server_with_room_takes_over_what_is_slow_elsewhere() -> None:
    talk = crowded()
    ((what, name, why),) = talk.say(LoadReport("d", load()))
    assert (what, why) == ("preempt", "pulled")
    assert talk.say(Preempted(name, 5)) == [("go", name, "p", "d", "resume")]


def test_prefill_servers_take_nothing_over() -> None:
    assert crowded().say(LoadReport("p", load())) == []


def test_nothing_is_pulled_off_a_server_that_is_being_drained() -> None:
    talk = crowded()
    talk.say(WorkerDraining("r"))
    assert talk.say(LoadReport("d", load())) == []


def test_of_many_servers_that_may_hand_work_over_one_is_looked_at_at_a_time() -> None:
    names = ("r1", "r2", "r3")
    talk = Talk([prefill(), decode("d"), *map(relaxed, names)], RULES)
    core = talk.core
    looked: list[str] = []
    preemptor = core._preemptor
    for name in names:
        for _ in range(2):
            core.ledgers[name].offline.add(3000, 3000)
            core.ledgers[name].add_decode(3000, 3000)
    preemptor._rule = Watched(looked)
    for _ in range(5):
        preemptor.pull(core.ledgers["d"], core.ledgers.values(), RULES.admit, 0)
    assert looked == ["r1", "r2", "r3", "r1", "r2"]


@dataclass(frozen=True)
class Watched(Stay):
    """Says that a pull may pay anywhere, and notes where it is looked for."""

    looked: list[str]

    def may_pull(self, strict: Ledger, relaxed: Ledger) -> bool:
        return True

    def pull(self, strict: Ledger, relaxed: Ledger, victims: Victims) -> Victim | None:
        self.looked.append(relaxed.worker.name)
        return None


def test_a_job_that_was_pulled_goes_back_if_the_room_is_gone() -> None:
    talk = running("a", fleet=[prefill(), decode("d", max_running=1), relaxed()])
    ticket = talk.core._tickets["a"]
    ticket.leaves = "r"
    talk.core._take_off(ticket, Reason.PULLED)
    talk.arrive(online("b"))
    assert talk.say(Preempted("a", 5)) == [("go", "a", "p", "r", "resume")]


def test_servers_that_come_and_go_under_new_names_are_forgotten() -> None:
    talk = Talk(fleet(), replace(RULES, displace=ByCost()))
    for number in range(50):
        name = f"p{number}"
        talk.say(WorkerUp(prefill(name, chunk_tokens=8192)))
        talk.arrive(offline("a", LONG), offline("b", LONG))
        talk.say(Finished("a", 1), Finished("b", 1), WorkerGone(name))
    assert len(talk.core._preemptor._residents) < 5
    assert len(talk.core._sender._underway._tickets) < 5


def test_the_accounts_say_what_it_cost() -> None:
    talk = running("a", "b", fleet=strict_only(max_running=2))
    talk.arrive(online("c", at_us=9))
    talk.say(Preempted("b", 3, lost=2))
    accounts = talk.core.accounts
    assert accounts.preemptions == {(Kind.OFFLINE, "d", Reason.ONLINE_DECODE): 1}
    assert accounts.lost_tokens == {Kind.OFFLINE: 2}
    assert accounts.resent_tokens == {Kind.OFFLINE: 103}


def test_a_prompt_that_was_taken_off_before_it_was_computed_is_in_the_accounts() -> None:
    talk = Talk(fleet(), RULES)
    talk.arrive(offline("a", LONG))
    assert talk.arrive(online("b")) == [("preempt", "a", "online_prefill")]
    talk.say(Preempted("a"))
    assert talk.core.accounts.resent_tokens == {Kind.OFFLINE: LONG}
