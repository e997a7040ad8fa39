"""What no sequence of events may break, whatever jobs, servers and failures do."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from gateway.books import Ticket
from gateway.choice import fits_ever, is_worth_a_wait
from gateway.core import Core, Rules
from policies.admit import Headroom
from policies.breaker import BreakerRule
from policies.colocation import Colocated
from policies.displace import ByCost, Cheapest, Never, Slices
from policies.events import (
    Arrived,
    Cancel,
    Continue,
    Decision,
    Dispatch,
    Event,
    Fail,
    Failed,
    Fault,
    Finished,
    FirstToken,
    Freed,
    Left,
    LoadReport,
    PartDone,
    Pause,
    Preempt,
    Preempted,
    PrefillDone,
    Progress,
    Recall,
    Reject,
    Release,
    SwitchOver,
    SwitchRole,
    WakeAt,
    Wakeup,
    WorkerDown,
    WorkerDraining,
    WorkerGone,
    WorkerUp,
)
from policies.gather import ByLength
from policies.hold import ForSlack as HoldForSlack
from policies.ledger import Ledger
from policies.order import Edf, Fcfs
from policies.pools import ByLatency, Shared, WithoutRelaxed
from policies.preempt import AbortRule, ForSlack
from policies.retry import RetryRule
from policies.salvage import Salvage
from policies.standstill import Standstill
from policies.steps import Costs
from policies.types import Job, Kind, Pool, Resume, Role
from tests.gateway.talk import load, offline, online, server
from tests.policies.sites import COST

ADMIT = Headroom(prefill_cap_tokens=600, output_reserve_tokens=50)
RULES = [
    Rules(
        order=order,
        displace=displace,
        pools=pools,
        admit=ADMIT,
        max_queued=12,
        load_stale_us=3_000_000,
        breaker=BreakerRule(failures=2, cooldown_us=500_000),
        retry=RetryRule(burst_tokens=2_000, offline_attempts=4),
    )
    for order, displace in (
        (Fcfs(), Never()),
        (Edf(), ByCost()),
        (Salvage(), ByCost(least_chunks=1, margin=0)),
        (Salvage(), Slices()),
        (Edf(), Cheapest(least_chunks=1, margin=0, turn_us=1.0)),
    )
    for pools in (Shared(), ByLatency())
]
COLOCATED = Rules(
    pools=ByLatency(lends=True),
    admit=Colocated(
        prefill_cap_tokens=600, output_reserve_tokens=50, ttft_us=40_000, tpot_us=9_000
    ),
    give_way=ForSlack(tpot_us=9_000, pulls=True, ttft_share=0.01),
    aborts=AbortRule(per_request=2, per_s=2, burst=6),
    costs=Costs(default=COST),
    max_queued=12,
    load_stale_us=3_000_000,
    breaker=BreakerRule(failures=2, cooldown_us=500_000),
    retry=RetryRule(burst_tokens=2_000, offline_attempts=4),
)
RULES += [
    COLOCATED,
    replace(RULES[2], gather=ByLength(cap_tokens=300)),
    replace(RULES[2], hold=HoldForSlack(answer_tokens=50), costs=Costs(default=COST)),
    replace(RULES[7], hold=HoldForSlack(answer_tokens=50), costs=Costs(default=COST)),
    replace(COLOCATED, hold=HoldForSlack(answer_tokens=50)),
    replace(COLOCATED, gather=ByLength(wait_share=1.0)),
    replace(COLOCATED, standstill=Standstill(tpot_us=9_000)),
    replace(COLOCATED, costs=Costs(), give_way=ForSlack(by_bottleneck=True, pulls=True)),
    replace(COLOCATED, pools=ByLatency(lends=True, without_relaxed=WithoutRelaxed.HOLD)),
    replace(COLOCATED, pools=ByLatency(lends=True, without_relaxed=WithoutRelaxed.REJECT)),
]
WORKERS = {
    "p1": server("p1", Role.PREFILL),
    "p2": server("p2", Role.PREFILL, chunk_tokens=100, pool=Pool.RELAXED),
    "d1": server("d1", Role.DECODE, kv_tokens=1500, model="x", host="gpu"),
    "d2": server("d2", Role.DECODE, kv_tokens=700, max_running=2, pool=Pool.RELAXED, host="gpu"),
    "u1": server("u1", Role.UNIFIED, kv_tokens=900, model="y"),
    "u2": server("u2", Role.UNIFIED, kv_tokens=1200, pool=Pool.RELAXED),
}
FLEETS = [
    ("d2", "p1"),
    ("d1", "d2", "p2"),
    ("u1",),
    ("d2", "p1", "u1"),
    ("d1", "p1", "u2"),
    ("d1", "d2", "p1", "u2"),
    tuple(sorted(WORKERS)),
]
FAULTS = st.sampled_from([Fault.DIED, Fault.BUSY, Fault.REQUEST])


class Attempt:
    """What the servers know of one dispatch; it owes the core exactly one last word."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.job = dispatch.job
        self.is_part = dispatch.upto > 0
        if self.is_part:
            self.job = dispatch.job._replace(prompt_tokens=dispatch.upto, max_tokens=1)
        self.decode = dispatch.decode
        self.servers = {dispatch.prefill or dispatch.decode, dispatch.decode}
        self.generated = 0
        self.prefilled = False
        self.stopped = False
        self.preempted = False


def is_free_for(job: Job, now_us: int, ledger: Ledger) -> bool:
    return ledger.is_empty and ledger.takes(job, now_us)


def alone(attempts: list[Attempt]) -> int:
    """The one job that an empty server takes over its watermark, with nothing beside it."""
    return max(ADMIT.reserved(it.job) for it in attempts)


class CoreMachine(RuleBasedStateMachine):
    """Plays all servers and all clients at once; the core only ever hears events."""

    def __init__(self) -> None:
        super().__init__()
        self.now_us = 0
        self.alarm_us: int | None = None
        self.running: dict[str, Attempt] = {}
        self.known: set[str] = set()
        self.ended: dict[str, Decision | Finished | str] = {}
        self.standing: set[str] = set()

    @initialize(rules=st.sampled_from(RULES), fleet=st.sampled_from(FLEETS))
    def begin(self, rules: Rules, fleet: tuple[str, ...]) -> None:
        self.fleet = fleet
        self.core = Core(rules, [WORKERS[name] for name in fleet])
        for ledger in self.core.ledgers.values():  # each has shown its rate: 1,000 tokens a second
            ledger.prefill_rate.done(4_000, 4_000_000)

    # What may happen.

    @rule(
        kind=st.sampled_from(Kind),
        tokens=st.integers(1, 80) | st.integers(1, 1600),
        model=st.sampled_from(["", "", "x", "z"]),
        resume=st.sampled_from(Resume),
    )
    def arrive(self, kind: Kind, tokens: int, model: str, resume: Resume) -> None:
        name = f"j{len(self.known)}"
        make = online if kind is Kind.ONLINE else offline
        self.known.add(name)
        self.tell(Arrived(make(name, tokens, self.now_us, model=model, resume=resume)))

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.alive()))
        if name not in self.running:
            self.ended[name] = "left"
        self.tell(Left(name))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(1, 60))
    def generate(self, data: st.DataObject, tokens: int) -> None:
        attempt = self.draw_attempt(data)
        if attempt.is_part:
            self.end(attempt)
            return
        events: list[Event] = []
        if not attempt.prefilled and len(attempt.servers) == 2:
            events.append(PrefillDone(attempt.job.id))
        if not attempt.generated:
            events.append(FirstToken(attempt.job.id))
        attempt.prefilled, attempt.generated = True, attempt.generated + tokens
        self.tell(*events, Progress(((attempt.job.id, attempt.generated),)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        attempt = self.draw_attempt(data)
        attempt.prefilled = True
        self.tell(PrefillDone(attempt.job.id))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.end(self.draw_attempt(data))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fault=FAULTS, restartable=st.booleans(), blame=st.booleans())
    def fail(self, data: st.DataObject, fault: Fault, restartable: bool, blame: bool) -> None:  # noqa: FBT001  # hypothesis passes them by name
        attempt = self.draw_attempt(data)
        blamed = tuple(sorted(attempt.servers)) if blame else ()
        self.break_off(
            attempt, Failed(attempt.job.id, fault, blamed, attempt.generated, restartable)
        )

    @precondition(lambda self: any(it.stopped for it in self.running.values()))
    @rule()
    def free(self) -> None:
        self.free_stopped()

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def recall(self, data: st.DataObject) -> None:
        self.tell(Recall(data.draw(st.sampled_from(self.alive()))))

    @precondition(lambda self: any(it.preempted for it in self.running.values()))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.yield_up(data.draw(st.sampled_from(self.yielding())))

    @rule(data=st.data(), tokens=st.integers(0, 900))
    def report(self, data: st.DataObject, tokens: int) -> None:
        self.tell(LoadReport(self.draw_server(data), load(tokens, self.now_us)))

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.tell(WorkerDown(self.draw_server(data)))

    @rule(data=st.data())
    def regain(self, data: st.DataObject) -> None:
        self.tell(WorkerUp(WORKERS[self.draw_server(data)]))

    @rule(data=st.data(), last=st.sampled_from([WorkerDraining, WorkerGone]))
    def take_away(self, data: st.DataObject, last: type[WorkerGone]) -> None:
        self.tell(last(self.draw_server(data)))

    @rule(rules=st.sampled_from(RULES))
    def reload(self, rules: Rules) -> None:
        self.core.adopt(rules)
        self.tell(Wakeup())

    @rule(us=st.integers(1, 4_000_000))
    def wait(self, us: int) -> None:
        """Time passes, and the driver's timer fires when it is due."""
        until_us = self.now_us + us
        while self.alarm_us is not None and self.alarm_us <= until_us:
            self.ring()
        self.now_us = until_us

    @precondition(lambda self: self.alarm_us is not None)
    @rule()
    def be_late(self) -> None:
        """Something else happens after the alarm is due and before the timer fires."""
        self.now_us = max(self.now_us, (self.alarm_us or 0) + 1)
        self.tell(Progress(()))

    # How it is told.

    def ring(self) -> None:
        assert self.alarm_us is not None
        self.now_us, self.alarm_us = max(self.now_us, self.alarm_us), None
        self.tell(Wakeup())

    def tell(self, *events: Event) -> None:
        for decision in self.core.handle(events, self.now_us):
            self.obey(decision)

    def obey(self, decision: Decision) -> None:
        if isinstance(decision, WakeAt):
            assert decision.us > self.now_us
            self.alarm_us = decision.us
            return
        if isinstance(decision, SwitchRole | Release | SwitchOver):
            raise AssertionError("nobody asked for a switch")
        if isinstance(decision, Pause | Continue):
            self.stand(decision)
            return
        name = decision.job.id
        assert name in self.known
        assert name not in self.ended, "a job that has ended is never mentioned again"
        match decision:
            case Dispatch():
                assert name not in self.running, "one attempt at a time"
                self.running[name] = Attempt(decision)
            case Preempt():
                assert not self.running[name].preempted, "no victim is chosen twice"
                assert not self.running[name].stopped
                assert decision.job.resume is not Resume.UNTIL_SHOWN or not self.shown(name)
                self.running[name].preempted = True
            case Cancel():
                assert not self.running[name].stopped
                self.running[name].stopped = True
            case Reject():
                assert name not in self.running
                self.ended[name] = decision
            case Fail():
                self.ended[name] = decision

    def stand(self, decision: Pause | Continue) -> None:
        if isinstance(decision, Continue):
            self.standing.discard(decision.worker)
            return
        assert decision.worker not in self.standing, "nobody is paused twice"
        assert WORKERS[decision.worker].pool is Pool.RELAXED
        self.standing.add(decision.worker)

    def end(self, attempt: Attempt) -> None:
        del self.running[attempt.job.id]
        if attempt.is_part and attempt.stopped:
            self.ended[attempt.job.id] = "left"
            self.tell(Freed(attempt.job.id))
            return
        if attempt.is_part:  # what nobody can cut has 7 tokens and more, here
            self.tell(PartDone(attempt.job.id, is_cut=attempt.job.prompt_tokens % 7 > 0))
            return
        self.ended[attempt.job.id] = "finished"
        self.tell(Finished(attempt.job.id, attempt.generated))

    def break_off(self, attempt: Attempt, event: Failed) -> None:
        del self.running[attempt.job.id]
        if attempt.stopped:
            self.ended[attempt.job.id] = "left"
        self.tell(event)

    def free_stopped(self) -> None:
        for name in [name for name, it in self.running.items() if it.stopped]:
            del self.running[name]
            self.ended[name] = "left"
            self.tell(Freed(name))

    def yield_up(self, name: str) -> None:
        """Its legs are closed; a client may have left meanwhile."""
        attempt = self.running.pop(name)
        kept = attempt.generated if attempt.job.resume is Resume.EXACT else 0
        if attempt.stopped:
            self.ended[name] = "left"
        self.tell(Preempted(name, kept, attempt.generated - kept))

    def yielding(self) -> list[str]:
        return sorted(name for name, it in self.running.items() if it.preempted)

    def shown(self, name: str) -> bool:
        return self.running[name].generated > 0

    def alive(self) -> list[str]:
        return sorted(
            name
            for name in self.known - self.ended.keys()
            if name not in self.running or not self.running[name].stopped
        )

    def draw_attempt(self, data: st.DataObject) -> Attempt:
        return self.running[data.draw(st.sampled_from(sorted(self.running)))]

    def draw_server(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.fleet))

    # What holds all along.

    @invariant()
    def every_job_is_somewhere_once(self) -> None:
        assert len(self.core) == len(self.known) - len(self.ended)
        queued = sum(self.core.queued(kind) for kind in Kind)
        assert queued <= len(self.core) - len(self.running)

    @invariant()
    def the_books_hold_what_the_servers_hold(self) -> None:
        assert sum(self.core.placed(kind) for kind in Kind) == len(self.running)
        for name, ledger in self.core.ledgers.items():
            assert ledger.decodes == sum(name == it.decode for it in self.running.values())
            assert 0 <= ledger.prefills <= sum(name in it.servers for it in self.running.values())
            assert ledger.reserved_tokens >= ledger.context_tokens >= 0

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        """Growth may go beyond the watermark, promises may not, but for one that runs alone."""
        for name, ledger in self.core.ledgers.items():
            here = [it for it in self.running.values() if it.decode == name]
            if ledger.max_running:
                assert len(here) <= ledger.max_running
            if ledger.kv_tokens and len(here) > 1:
                promised = sum(ADMIT.reserved(it.job) for it in here)
                assert promised <= max(ledger.kv_tokens * ADMIT.kv_watermark, alone(here))
            if ledger.prefills > 1:
                cap = ledger.worker.chunk_tokens * 2 or ADMIT.prefill_cap_tokens
                assert ledger.prefill_tokens <= cap

    @invariant()
    def nobody_waits_while_a_server_is_free(self) -> None:
        """Free: empty, in rotation and large enough; who has failed there may wait for another,
        and part of a prompt for the server that has its beginning.

        A short prompt may be held for company, for a moment that has an end.
        """
        lanes = list(self.core._lanes)
        online_waits = any(lane.waiting[Kind.ONLINE] for lane in lanes)
        for lane in lanes:
            kind = Kind.ONLINE if online_waits else Kind.OFFLINE
            first = lane.waiting[kind].peek()
            held_us = self.core._agenda.held.entries.get(f"{kind}/{lane.model}", (0,))[0]
            assert held_us <= self.now_us + 50_000
            if held_us > self.now_us and self.core._rules.gather.holds:
                continue
            if first is not None and not self._has_a_reason(self.core._tickets[first]):
                job = self.core._tickets[first].job
                free = self.core._lanes.candidates(lane, kind, self.now_us).only(
                    partial(is_free_for, job, self.now_us)
                )
                assert not fits_ever(job, free, ADMIT), (job, free)

    @invariant()
    def nobody_is_set_aside_whom_a_server_in_rotation_could_take(self) -> None:
        """Else it would wait for an event that need not come."""
        lanes = self.core._lanes
        for lane in lanes:
            for kind in Kind:
                found = lanes.candidates(lane, kind, self.now_us)
                for name in lane.aside[kind]:
                    job = self.core._tickets[name].job
                    assert not is_worth_a_wait(job, found, ADMIT, self.now_us), (job, found)

    @staticmethod
    def _has_a_reason(ticket: Ticket) -> bool:
        return bool(ticket.avoid) or ticket.stands_aside

    @invariant()
    def who_waits_is_woken(self) -> None:
        if self.core._agenda.give_up:
            assert self.alarm_us is not None

    def teardown(self) -> None:
        """Once the world calms down every job comes to its end, and the books to zero."""
        if not hasattr(self, "core"):
            return
        for name in self.fleet:
            self.tell(WorkerGone(name), WorkerUp(WORKERS[name]))
        for _ in range(10_000):
            self.free_stopped()
            if names := self.yielding():
                self.yield_up(names[0])
            elif self.running:
                self.end(self.running[min(self.running)])
            elif self.alarm_us is not None:
                self.ring()
            else:
                break
        assert self.standing == set()
        assert self.ended.keys() == self.known
        assert len(self.core) == 0
        for ledger in self.core.ledgers.values():
            booked = (ledger.prefills, ledger.prefill_tokens, ledger.decodes)
            assert booked == (0, 0, 0), ledger
            assert (ledger.context_tokens, ledger.reserved_tokens) == (0, 0), ledger


CoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
TestCore = CoreMachine.TestCase
TestCore.__doc__ = "The core among random servers and clients."


def random_events(rng: random.Random, count: int) -> list[tuple[int, list[Event]]]:
    """Mostly nonsense: the same nonsense must get the same answers."""
    now_us, script = 0, []
    for i in range(count):
        now_us += rng.randrange(400_000)
        name = f"j{rng.randrange(i + 1)}"
        make = rng.choice([online, offline])
        events: list[Any] = [Arrived(make(f"j{i}", rng.randrange(1, 800), now_us))]
        events += rng.sample([Left(name), WorkerDown("d1"), WorkerUp(WORKERS["d1"]), Wakeup()], 2)
        script.append((now_us, events))
    return script


@given(st.integers(0, 2**32))
def test_the_same_events_bring_the_same_decisions(seed: int) -> None:
    script = random_events(random.Random(seed), 60)
    first, second = (Core(RULES[3], WORKERS.values()) for _ in range(2))
    for now_us, events in script:
        assert first.handle(events, now_us) == second.handle(events, now_us)


@given(st.permutations(sorted(WORKERS)), st.integers(0, 2**32))
def test_the_order_in_which_servers_are_listed_does_not_matter(names: list[str], seed: int) -> None:
    script = random_events(random.Random(seed), 30)
    sorted_core = Core(RULES[0], WORKERS.values())
    other_core = Core(RULES[0], [WORKERS[name] for name in names])
    for now_us, events in script:
        assert sorted_core.handle(events, now_us) == other_core.handle(events, now_us)


@given(st.lists(st.tuples(st.sampled_from(Kind), st.integers(1, 700)), max_size=30))
def test_the_order_of_arrivals_within_an_instant_does_not_matter(
    wanted: list[tuple[Kind, int]],
) -> None:
    jobs = [
        (online if kind is Kind.ONLINE else offline)(f"j{i}", tokens)
        for i, (kind, tokens) in enumerate(wanted)
    ]
    rules = replace(RULES[0], max_queued=1000)
    forth, back = (Core(rules, WORKERS.values()) for _ in range(2))
    assert forth.handle([Arrived(job) for job in jobs], 0) == back.handle(
        [Arrived(job) for job in reversed(jobs)], 0
    )
