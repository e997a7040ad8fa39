"""Conversations in which a kind has servers of its pool in some roles only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.books import Lane
from gateway.core import Core
from policies.colocation import Colocated
from policies.events import (
    Finished,
    FirstToken,
    LoadReport,
    PrefillDone,
    Progress,
    RoleSwitched,
    SwitchWanted,
    WorkerDown,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from policies.ledger import Ledger
from policies.pools import ByLatency, WithoutRelaxed
from policies.preempt import ForSlack
from policies.retry import RetryRule
from policies.steps import Costs
from policies.types import Kind, Pool, Role, Worker
from tests.gateway.talk import (
    LATENCY,
    SECOND,
    Talk,
    broke,
    decode,
    load,
    offline,
    online,
    prefill,
    server,
    unified,
)
from tests.policies.sites import COST

RELAXED = Pool.RELAXED
LENDING = replace(
    LATENCY,
    pools=ByLatency(lends=True),
    admit=Colocated(tpot_us=50_000),
    give_way=ForSlack(tpot_us=50_000, pulls=True),
    costs=Costs(default=COST),
)


def for_online(**strict: Any) -> list[Worker]:
    """Strict servers decode; the unified one is relaxed, as in `slackwater fleet --cpu`."""
    return [prefill(), decode("d", **strict), decode("r", pool=RELAXED), unified(pool=RELAXED)]


def for_offline(**fields: Any) -> list[Worker]:
    """The unified server is relaxed, and nobody else."""
    return [prefill(), decode("d"), unified(pool=RELAXED, **fields)]


def begun(talk: Talk, *names: str) -> Talk:
    talk.say(*map(PrefillDone, names), *map(FirstToken, names))
    return talk


def where(said: list[tuple[Any, ...]]) -> list[str]:
    """The servers that decode."""
    legs = [[leg for leg in each[2:] if leg not in ("retry", "resume")] for each in said]
    return [names[-1] for names in legs]


# Online work.


def test_online_work_keeps_off_a_relaxed_unified_server_while_a_strict_one_decodes() -> None:
    talk = Talk(for_online(), LATENCY)
    said = [talk.arrive(online(name), at_us=at_us) for at_us, name in enumerate("abcdef")]
    assert [each for one in said for each in one] == [("go", n, "p", "d") for n in "abcdef"]


def test_online_work_keeps_off_relaxed_decode_servers_while_a_unified_one_is_strict() -> None:
    talk = Talk([prefill(), decode("r", pool=RELAXED), unified()], LATENCY)
    assert where(talk.arrive(*map(online, "abcdef"))) == ["u"] * 6


def test_online_work_waits_for_its_full_server_rather_than_share() -> None:
    talk = begun(Talk(for_online(max_running=1), LATENCY), "a")
    talk.arrive(online("a"))
    assert talk.arrive(online("b")) == []


GONE: dict[str, Callable[[Talk], list[tuple[Any, ...]]]] = {
    "the prefill server is silent": lambda talk: talk.say(WorkerDown("p")),
    "the prefill server is drained": lambda talk: talk.say(WorkerDraining("p")),
    "the prefill server is off the list": lambda talk: talk.say(WorkerGone("p")),
    "the strict server is silent": lambda talk: talk.say(WorkerDown("d")),
    "the strict server is drained": lambda talk: talk.say(WorkerDraining("d")),
    "the strict server is off the list": lambda talk: talk.say(WorkerGone("d")),
    "the strict server changes its role": lambda talk: talk.say(
        SwitchWanted("d", Role.PREFILL, "")
    ),
    "the strict server fails": lambda talk: talk.say(*[broke(n, "d") for n in "xyz"]),
}


@pytest.mark.parametrize("way", GONE)
def test_what_waits_for_a_pool_shares_at_once_when_that_can_serve_no_more(way: str) -> None:
    rules = replace(LATENCY, retry=RetryRule(online_attempts=1))
    talk = Talk(for_online(max_running=3), rules)
    talk.arrive(*map(online, "xyz"))
    begun(talk, *"xyz")
    assert talk.arrive(online("a")) == []
    (went,) = [each for each in GONE[way](talk) if each[:2] == ("go", "a")]
    assert where([went])[0] in ("u", "r")
    assert where(talk.arrive(online("b"))) != ["d"]


def test_a_pool_that_can_serve_again_gets_its_kind_back() -> None:
    talk = Talk(for_online(), LATENCY)
    talk.say(WorkerDown("p"))
    assert talk.arrive(online("a")) == [("go", "a", "u")]
    talk.say(WorkerUp(prefill()))
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]


def test_online_work_leaves_a_relaxed_server_when_another_one_turns_to_decode() -> None:
    workers = [prefill(), prefill("q"), decode("r", pool=RELAXED), unified(pool=RELAXED)]
    talk = Talk(workers, LATENCY)
    assert where(talk.arrive(online("a")))[0] in ("u", "r")
    assert talk.say(SwitchWanted("q", Role.DECODE, "")) == [("switch", "q", "decode")]
    assert where(talk.arrive(online("b")))[0] in ("u", "r")
    talk.say(RoleSwitched("q", Role.DECODE))
    assert where(talk.arrive(*map(online, "cdef"))) == ["q"] * 4


@pytest.mark.parametrize("failed", ["p", "d"])
def test_a_request_that_its_pool_has_failed_goes_elsewhere(failed: str) -> None:
    talk = Talk(for_online(), LATENCY)
    talk.arrive(online("a"))
    (name,) = where(talk.say(broke("a", failed)))
    assert name in ("u" if failed == "p" else "ur")
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]


def test_it_tries_its_pool_again_where_the_others_are_full_and_holds_nobody_up() -> None:
    """Offline work has the relaxed server."""
    talk = Talk([prefill(), decode("d"), decode("r", pool=RELAXED, max_running=1)], LATENCY)
    talk.arrive(offline("x"), online("a"))
    begun(talk, "x", "a")
    assert talk.say(broke("a", "d")) == [("go", "a", "p", "d", "retry")]
    assert talk.arrive(online("b")) == [("go", "b", "p", "d")]


def test_a_second_server_of_its_pool_comes_before_those_of_the_other() -> None:
    talk = Talk([*for_online(), decode("d2")], LATENCY)
    talk.arrive(online("a"))
    assert where(talk.say(broke("a", "d"))) == ["d2"]


def test_offline_work_that_has_failed_tries_its_pool_again() -> None:
    rules = replace(LATENCY, retry=RetryRule(backoff_us=0))
    talk = Talk([prefill(), decode("d"), decode("r", pool=RELAXED)], rules)
    talk.arrive(offline("a"))
    assert where(talk.say(broke("a", "r"))) == ["r"]


def test_a_prefill_server_without_use_for_a_kind_does_not_hide_that_its_own_is_crowded() -> None:
    """Offline prompts fill the strict unified server while the relaxed one is away."""
    workers = [prefill(), decode("r", pool=RELAXED), unified(chunk_tokens=8192)]
    talk = Talk(workers, LENDING)
    talk.say(WorkerDown("r"))
    assert talk.arrive(offline("a", 60_000)) == [("go", "a", "u")]
    assert talk.arrive(online("b")) == [("preempt", "a", "online_prefill")]


# Offline work.


def test_offline_work_keeps_off_strict_decode_servers_while_a_unified_one_is_relaxed() -> None:
    talk = Talk(for_offline(), LATENCY)
    assert where(talk.arrive(*map(offline, "abcdef"))) == ["u"] * 6
    assert talk.say(WorkerDown("u")) == []
    assert talk.arrive(offline("g")) == [("go", "g", "p", "d")]
    talk.say(WorkerUp(unified(pool=RELAXED)))
    assert talk.arrive(offline("h")) == [("go", "h", "u")]


def test_offline_work_keeps_off_a_strict_unified_server_while_a_relaxed_one_decodes() -> None:
    talk = Talk([prefill(), decode("r", pool=RELAXED), unified()], LATENCY)
    assert where(talk.arrive(*map(offline, "abcdef"))) == ["r"] * 6
    talk.say(WorkerDraining("p"))
    assert talk.arrive(offline("g")) == [("go", "g", "u")]


def test_strict_decode_servers_lend_to_what_has_a_relaxed_unified_server() -> None:
    talk = Talk(for_offline(max_running=1), LENDING)
    assert talk.arrive(offline("a"), offline("b")) == [("go", "a", "u"), ("go", "b", "p", "d")]


def test_what_they_could_lend_is_known_by_their_steps_alone() -> None:
    talk = Talk(for_offline(max_running=1), replace(LENDING, costs=Costs()))
    assert talk.arrive(offline("a"), offline("b")) == [("go", "a", "u")]
    assert talk.say(WorkerDown("u")) == [("go", "b", "p", "d")]


def test_a_job_set_aside_shares_when_nobody_is_left_of_its_pool() -> None:
    """Too large for the one that is there, it waits for the one that is not."""
    workers = [prefill(), decode("d", kv_tokens=9000), decode("r", kv_tokens=500, pool=RELAXED)]
    talk = Talk([*workers, decode("big", kv_tokens=9000, pool=RELAXED)], LATENCY)
    talk.say(WorkerDown("big"))
    assert talk.arrive(offline("a", 2000)) == []
    assert talk.say(WorkerDown("r")) == [("go", "a", "p", "d")]


def test_a_job_set_aside_shares_when_the_last_breaker_of_its_pool_opens() -> None:
    workers = [prefill(), decode("d", kv_tokens=9000), decode("r", kv_tokens=500, pool=RELAXED)]
    rules = replace(LATENCY, retry=RetryRule(offline_attempts=1))
    talk = Talk([*workers, decode("big", kv_tokens=9000, pool=RELAXED)], rules)
    talk.say(WorkerDown("big"))
    talk.arrive(offline("x", 10), offline("y", 10), offline("z", 10))
    assert talk.arrive(offline("a", 2000)) == []
    said = [talk.say(broke(name, "r")) for name in "xyz"]
    assert ("go", "a", "p", "d") in said[-1]


# Offline work that may not share.


def told(policy: WithoutRelaxed, *workers: Worker) -> Talk:
    pools = ByLatency(lends=True, without_relaxed=policy)
    return Talk(list(workers), replace(LENDING, pools=pools))


@pytest.mark.parametrize("gone", [WorkerDown("u"), WorkerDraining("u"), WorkerGone("u")])
def test_held_work_waits_for_a_relaxed_unified_server_beside_strict_ones(gone: Any) -> None:
    talk = told(WithoutRelaxed.HOLD, *for_offline(), unified("s"))
    talk.say(gone)
    assert talk.arrive(offline("a")) == []
    assert talk.arrive(online("b"))[0][:2] == ("go", "b")
    assert talk.say(WorkerUp(unified(pool=RELAXED))) == [("go", "a", "u")]


@pytest.mark.parametrize("gone", [WorkerDown("u"), WorkerDraining("u"), WorkerGone("u")])
def test_work_is_refused_without_a_relaxed_unified_server_beside_strict_ones(gone: Any) -> None:
    talk = told(WithoutRelaxed.REJECT, *for_offline(), unified("s"))
    assert talk.arrive(offline("a")) == [("go", "a", "u")]
    talk.say(gone)
    assert talk.arrive(offline("b")) == [("reject", "b", "no_relaxed_worker")]


def test_a_relaxed_decode_server_that_no_prefill_server_could_work_with_counts_for_nothing() -> (
    None
):
    workers = [decode("r", pool=RELAXED), unified()]
    refused = ("reject", "a", "no_relaxed_worker")
    assert told(WithoutRelaxed.REJECT, *workers).arrive(offline("a")) == [refused]
    held = told(WithoutRelaxed.HOLD, *workers)
    assert held.arrive(offline("a")) == []
    assert held.say(WorkerUp(prefill())) == [("go", "a", "p", "r")]


# Laws.

STATES = ["up", "up", "down", "drained", "switching", "failed"]
FLEETS = st.lists(
    st.tuples(st.sampled_from(Role), st.sampled_from(Pool), st.sampled_from(STATES)), max_size=7
)


def put(ledger: Ledger, state: str) -> None:
    ledger.up = state != "down"
    ledger.draining, ledger.switching = state == "drained", state == "switching"
    for _ in range(3 if state == "failed" else 0):
        ledger.breaker.failed(0)


def can_serve(ledgers: list[Ledger]) -> bool:
    roles = {e.worker.role for e in ledgers}
    return Role.UNIFIED in roles or {Role.PREFILL, Role.DECODE} <= roles


@given(
    fleet=FLEETS,
    kind=st.sampled_from(Kind),
    policy=st.sampled_from(WithoutRelaxed),
    lends=st.booleans(),
    known=st.booleans(),
)
def test_a_kind_uses_its_pool_while_that_can_serve_and_whoever_can_when_it_may(
    fleet: list[tuple[Role, Pool, str]],
    kind: Kind,
    policy: WithoutRelaxed,
    *,
    lends: bool,
    known: bool,
) -> None:
    workers = [server(f"{i}", role, pool=pool) for i, (role, pool, _) in enumerate(fleet)]
    pools = ByLatency(lends=lends, without_relaxed=policy)
    costs = Costs(default=COST) if known else Costs()
    core = Core(replace(LENDING, pools=pools, costs=costs), workers)
    for ledger, (_, _, state) in zip(core.ledgers.values(), fleet, strict=True):
        put(ledger, state)
    there = [e for e in core.ledgers.values() if e.usable(SECOND // 1000)]
    found = core._lanes.candidates(Lane(""), kind, SECOND // 1000)

    wanted = Pool.STRICT if kind is Kind.ONLINE else RELAXED
    own = [e for e in there if e.worker.role is Role.PREFILL or e.worker.pool is wanted]
    others = [e for e in found.decodes + found.unified if e.worker.pool is not wanted]
    if can_serve(own):
        assert found.has_usable(SECOND // 1000)
        is_lent = kind is Kind.OFFLINE and lends and known
        assert is_lent or not others
        assert all(e.worker.role is Role.DECODE for e in others)
    elif pools.shares(kind):
        assert found.has_usable(SECOND // 1000) == can_serve(there)


def test_a_strict_unified_server_does_not_call_for_what_it_would_not_get() -> None:
    """Offline work that is taken off a relaxed server would go back there."""
    rules = replace(LENDING, admit=Colocated(tpot_us=50_000, gate=False))
    talk = Talk([prefill(chunk_tokens=8192), decode("r", pool=RELAXED), unified()], rules)
    crowd = [f"{i:03}" for i in range(120)]
    for name in crowd:
        talk.arrive(offline(name, 3000, max_tokens=4000))
        begun(talk, name)
    talk.say(Progress(tuple((name, 5) for name in crowd)))
    talk.say(Finished(crowd[0], 3000))
    assert talk.say(LoadReport("u", load())) == []
