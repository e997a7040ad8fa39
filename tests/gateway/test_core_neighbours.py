"""Conversations and laws of servers that share a GPU: who stands still for whom, and until when."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Colocation, Config
from gateway.core import Core, Rules
from gateway.rulebook import rules_of
from policies.colocation import Colocated
from policies.events import (
    Arrived,
    Continue,
    Dispatch,
    Event,
    Finished,
    FirstToken,
    Pause,
    PauseRefused,
    Preempt,
    Preempted,
    PrefillDone,
    Progress,
    WorkerDown,
    WorkerGone,
    WorkerUp,
)
from policies.order import Fcfs
from policies.pools import ByLatency
from policies.preempt import AbortRule, ForSlack
from policies.standstill import Standstill
from policies.steps import Costs
from policies.types import Kind, Pool, Resume, Worker
from tests.gateway.talk import SECOND, Talk, decode, offline, online, prefill
from tests.policies.sites import COST

RULE = Standstill(tpot_us=50_000)
RULES = Rules(
    order=Fcfs(),
    pools=ByLatency(),
    admit=Colocated(tpot_us=50_000),
    give_way=ForSlack(tpot_us=50_000),
    standstill=RULE,
)
NOTHING = Progress(())
TIGHT_US = 1
"""A target that no step keeps."""


def strict(**fields: Any) -> Worker:
    return decode("d", host="gpu", **fields)


def relaxed(name: str = "r", host: str = "gpu") -> Worker:
    return decode(name, pool=Pool.RELAXED, host=host)


def fleet(*others: Worker) -> list[Worker]:
    return [prefill(), strict(), relaxed(), *others]


def busy(*others: Worker, rules: Rules = RULES) -> Talk:
    """An offline and an online job decode, each on its server of one GPU."""
    talk = Talk(fleet(*others), rules)
    talk.arrive(offline("off"))
    talk.say(PrefillDone("off"), FirstToken("off"))
    talk.arrive(online("on"))
    talk.say(PrefillDone("on"), FirstToken("on"))
    return talk


def flow(talk: Talk, name: str, step_us: int, steps: int = 6) -> list[tuple[Any, ...]]:
    """Tokens come at that pace, and are told of ten times a second; what was decided meanwhile."""
    said: list[tuple[Any, ...]] = []
    for _ in range(steps):
        ticket = talk.core._tickets[name]
        tokens = ticket.generated + max(1, 100_000 // step_us)
        said += talk.say(Progress(((name, tokens),)), at_us=talk.now_us + 100_000)
    return said


def test_slow_online_tokens_have_the_neighbour_stand_still() -> None:
    assert flow(busy(), "on", 100_000) == [("pause", "r", "d")]


def test_it_goes_on_once_they_come_fast_enough_again() -> None:
    talk = busy()
    flow(talk, "on", 100_000)
    assert flow(talk, "on", 10_000, steps=10) == [("continue", "r")]


def test_it_goes_on_at_once_when_the_last_online_job_has_ended() -> None:
    talk = busy()
    flow(talk, "on", 100_000, steps=4)
    assert talk.say(Finished("on", 9)) == [("continue", "r")]


def test_nobody_stands_still_for_online_tokens_that_come_in_time() -> None:
    assert flow(busy(), "on", 10_000, steps=20) == []


def test_one_on_another_gpu_works_on() -> None:
    talk = Talk([prefill(), strict(), relaxed(host="other"), decode("e", host="other")], RULES)
    talk.arrive(offline("off"), online("on"))
    talk.say(*(made(name) for name in ("off", "on") for made in (PrefillDone, FirstToken)))
    assert flow(talk, "on", 100_000) == []


def test_where_steps_are_predicted_it_stands_still_before_the_first_token_is_late() -> None:
    talk = Talk(fleet(), replace(RULES, costs=Costs(default=COST)))
    talk.arrive(offline("off"))
    said = talk.arrive(online("on", tpot_us=TIGHT_US))
    assert said == [("go", "on", "p", "d"), ("pause", "r", "d")]


def test_a_prompt_in_danger_has_the_neighbour_stand_still_until_it_is_computed() -> None:
    here = [replace(prefill(), host="gpu"), decode("d"), relaxed()]
    talk = Talk(here, replace(RULES, costs=Costs(default=COST)))
    talk.arrive(offline("off"))
    talk.say(PrefillDone("off"), FirstToken("off"))
    said = talk.arrive(online("on", 50_000, deadline_us=300_000))
    assert said == [("go", "on", "p", "d"), ("pause", "r", "p")]
    assert talk.say(PrefillDone("on"), at_us=SECOND) == [("continue", "r")]


def test_after_the_longest_pause_its_work_goes_elsewhere_and_it_gets_nothing_new() -> None:
    talk = busy(relaxed("s", host=""))
    flow(talk, "on", 100_000, steps=4)
    said = flow(talk, "on", 100_000, steps=60)
    assert said == [("continue", "r"), ("preempt", "off", "stood_still")]
    assert talk.say(Preempted("off", 3)) == [("go", "off", "p", "s", "resume")]


def test_the_longest_pause_ends_though_nothing_else_happens() -> None:
    talk = busy()
    flow(talk, "on", 100_000, steps=4)
    since_us = talk.now_us
    assert ("continue", "r") in talk.sleep()
    assert talk.now_us <= since_us + RULE.longest_us


def test_offline_work_waits_while_its_server_stands_back_and_goes_there_afterwards() -> None:
    talk = busy()
    flow(talk, "on", 100_000, steps=4)
    assert talk.arrive(offline("more")) == []
    assert talk.say(Finished("on", 9)) == [("continue", "r"), ("go", "more", "p", "r")]


def test_an_online_job_that_needs_the_server_has_it_go_on() -> None:
    shared = prefill("p", host="gpu", pool=Pool.RELAXED)
    talk = Talk([shared, strict(), relaxed()], replace(RULES, costs=Costs(default=COST)))
    talk.arrive(offline("off"))
    assert ("pause", "p", "d") not in talk.arrive(online("on", tpot_us=TIGHT_US))
    talk.say(PrefillDone("on"))
    assert ("continue", "p") in talk.arrive(online("on2", tpot_us=TIGHT_US))


def test_a_server_that_cannot_be_paused_is_emptied() -> None:
    talk = busy()
    flow(talk, "on", 100_000, steps=4)
    assert talk.say(PauseRefused("r")) == [("preempt", "off", "stood_still")]


def test_it_is_emptied_no_faster_than_the_budget_of_aborts_allows() -> None:
    talk = Talk(fleet(), replace(RULES, aborts=AbortRule(per_s=0.0, burst=2)))
    jobs = [f"off{i}" for i in range(5)]
    for name in jobs:
        talk.arrive(offline(name))
        talk.say(PrefillDone(name), FirstToken(name))
    talk.arrive(online("on"))
    talk.say(PrefillDone("on"), FirstToken("on"))
    flow(talk, "on", 100_000, steps=4)
    talk.say(PauseRefused("r"))
    said = flow(talk, "on", 100_000)
    assert [it for it in said if it[0] == "preempt"] == []
    assert talk.core.placed(Kind.OFFLINE) == len(jobs)


def test_a_server_that_comes_is_told_to_go_on_whatever_was_before() -> None:
    assert Talk(fleet()).say(WorkerUp(relaxed())) == [("continue", "r")]
    assert Talk([prefill(), decode()]).say(WorkerUp(decode())) == []


def test_one_that_is_left_alone_on_its_gpu_goes_on() -> None:
    talk = busy()
    flow(talk, "on", 100_000, steps=4)
    assert talk.say(WorkerGone("d")) == [("continue", "r")]


def test_a_reload_that_forbids_it_has_all_go_on() -> None:
    talk = busy()
    flow(talk, "on", 100_000, steps=4)
    talk.core.adopt(replace(RULES, standstill=None))
    assert talk.say(NOTHING) == [("continue", "r")]


def test_the_settings_reach_the_rule() -> None:
    rule = rules_of(Config(colocation=Colocation(longest_pause_s=2.0))).standstill
    assert rule is not None
    assert (rule.longest_us, rule.step_share, rule.calm_share) == (2 * SECOND, 0.98, 0.9)
    assert rules_of(Config(colocation=Colocation(pause=False))).standstill is None


# Laws.

SHARED = [
    prefill("p", host="a", pool=Pool.RELAXED),
    decode("d1", host="a"),
    decode("d2", host="b", kv_tokens=2000),
    decode("r1", host="a", pool=Pool.RELAXED),
    decode("r2", host="b", pool=Pool.RELAXED, max_running=3),
]
LAWFUL = [
    RULES,
    replace(RULES, costs=Costs(default=COST)),
    replace(RULES, aborts=AbortRule(burst=2)),
]


class Play:
    """All clients and servers at once, at random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.core = Core(self.rng.choice(LAWFUL), SHARED)
        self.now_us = 0
        self.running: dict[str, int] = {}
        self.paused: dict[str, int] = {}
        self.begun = self.ended = 0

    def tell(self, *events: Event) -> None:
        back: list[Event] = []
        for decision in self.core.handle(events, self.now_us):
            match decision:
                case Dispatch(job):
                    self.running[job.id] = 0
                case Pause(worker, beside):
                    assert worker not in self.paused, "nobody is paused twice"
                    assert _online(self.core, beside), "only for online work"
                    self.paused[worker] = self.now_us
                case Continue(worker):
                    self.paused.pop(worker, None)
                case Preempt(job):
                    back.append(Preempted(job.id, self.running.pop(job.id)))
                case _:
                    pass
        self.check()
        if back:
            self.tell(*back)

    def check(self) -> None:
        hosts = {worker.name: worker.host for worker in SHARED}
        for name, since_us in self.paused.items():
            beside = [other for other in hosts if hosts[other] == hosts[name] and other != name]
            assert any(_online(self.core, other) for other in beside)
            assert not _online(self.core, name)
            assert self.now_us - since_us <= RULE.longest_us + 500_000

    def turn(self) -> None:
        self.now_us += self.rng.randrange(400_000)
        match self.rng.randrange(8):
            case 0 | 1:
                make = self.rng.choice([online, offline])
                job = make(f"j{self.begun}", self.rng.randrange(1, 900), self.now_us)
                resume = self.rng.choice([Resume.EXACT, Resume.RESTART])
                self.begun += 1
                self.tell(Arrived(job._replace(resume=resume, give_up_us=2**60)))
            case 2 if self.running:
                self.end(self.rng.choice(sorted(self.running)))
            case 3:
                self.tell(WorkerDown("r1"), WorkerUp(SHARED[3]))
            case _:
                self.grow()

    def grow(self) -> None:
        moved = []
        for name in list(self.running):
            if name in self.running and not self.running[name]:
                self.tell(PrefillDone(name), FirstToken(name))
            if name not in self.running:
                continue
            self.running[name] += self.rng.choice([1, 1, 1, 20])
            moved.append((name, self.running[name]))
        self.tell(Progress(tuple((name, made) for name, made in moved if name in self.running)))

    def end(self, name: str) -> None:
        self.ended += 1
        self.tell(Finished(name, self.running.pop(name)))


def _online(core: Core, name: str) -> bool:
    ledger = core.ledgers[name]
    return bool(ledger.online.count or ledger.prefills > ledger.offline.prefills)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_whoever_stands_still_does_so_for_online_work_and_not_for_long(seed: int) -> None:
    play = Play(seed)
    for _ in range(120):
        play.turn()
    for _ in range(1000):
        if not play.running:
            break
        play.now_us += 100_000
        play.end(min(play.running))
    assert play.paused == {}
    assert (len(play.core), play.ended) == (0, play.begun)
