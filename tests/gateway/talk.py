"""Words for conversations with the core: small jobs, small fleets, decisions as short tuples."""

from __future__ import annotations

from typing import Any

from gateway.core import Core, Rules
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
    Load,
    Pause,
    Preempt,
    Reason,
    Reject,
    Release,
    SwitchOver,
    SwitchRole,
    WakeAt,
    Wakeup,
)
from policies.order import Fcfs
from policies.pools import ByLatency
from policies.types import Job, Kind, Role, Worker

SECOND = 1_000_000
PATIENCE_US = 10 * SECOND
WINDOW_US = 3600 * SECOND

RULES = Rules(order=Fcfs())
LATENCY = Rules(order=Fcfs(), pools=ByLatency())


def online(name: str, tokens: int = 100, at_us: int = 0, **fields: Any) -> Job:
    job = Job(
        id=name,
        kind=Kind.ONLINE,
        model="",
        prompt_tokens=tokens,
        max_tokens=100,
        arrival_us=at_us,
        deadline_us=at_us + 2 * SECOND,
        give_up_us=at_us + PATIENCE_US,
        tpot_us=50_000,
    )
    return job._replace(**fields)


def offline(name: str, tokens: int = 100, at_us: int = 0, **fields: Any) -> Job:
    due_us = at_us + WINDOW_US
    values = {"kind": Kind.OFFLINE, "deadline_us": due_us, "give_up_us": due_us, "tpot_us": 0}
    return online(name, tokens, at_us, **(values | fields))


def server(name: str, role: Role, **fields: Any) -> Worker:
    return Worker(name=name, url=f"http://{name}", role=role, **fields)


def prefill(name: str = "p", **fields: Any) -> Worker:
    return server(name, Role.PREFILL, **fields)


def decode(name: str = "d", **fields: Any) -> Worker:
    return server(name, Role.DECODE, **fields)


def unified(name: str = "u", **fields: Any) -> Worker:
    return server(name, Role.UNIFIED, **fields)


def pair(**fields: Any) -> list[Worker]:
    """One prefill server, and one decode server with these fields."""
    return [prefill(), decode(**fields)]


def one_at_a_time() -> list[Worker]:
    return pair(max_running=1)


class Talk:
    """A core and its decisions in short: what was said last, without the alarms."""

    def __init__(self, workers: list[Worker], rules: Rules = RULES) -> None:
        self.core = Core(rules, workers)
        self.alarms: list[int] = []
        self.now_us = 0

    def say(self, *events: Event, at_us: int | None = None) -> list[tuple[Any, ...]]:
        self.now_us = self.now_us if at_us is None else at_us
        decisions = self.core.handle(events, self.now_us)
        self.alarms += [each.us for each in decisions if isinstance(each, WakeAt)]
        return [short(each) for each in decisions if not isinstance(each, WakeAt)]

    def arrive(self, *jobs: Job, at_us: int | None = None) -> list[tuple[Any, ...]]:
        return self.say(*map(Arrived, jobs), at_us=at_us)

    def sleep(self) -> list[tuple[Any, ...]]:
        """From alarm to alarm, as the driver does, until something is decided."""
        while self.alarms and self.alarms[-1] > self.now_us:
            if decisions := self.say(Wakeup(), at_us=self.alarms[-1]):
                return decisions
        return []


def short(decision: Decision) -> tuple[Any, ...]:
    match decision:
        case Dispatch(job, at, to, _, reason):
            where = (to,) if at is None else (at, to)
            first = reason is Reason.LEAST_WORK
            return ("go", job.id, *where) if first else ("go", job.id, *where, reason.value)
        case Preempt(job, reason):
            return ("preempt", job.id, reason.value)
        case Cancel(job, reason):
            return ("cancel", job.id, reason.value)
        case Reject(job, reason):
            return ("reject", job.id, reason.value)
        case Fail(job, reason, _):
            return ("fail", job.id, reason.value)
        case WakeAt(us):
            return ("wake", us)
        case _:
            return of_server(decision)


def of_server(
    decision: SwitchRole | Release | SwitchOver | Pause | Continue,
) -> tuple[Any, ...]:
    match decision:
        case SwitchRole(worker, role):
            return ("switch", worker, role.value)
        case Release(worker):
            return ("release", worker)
        case SwitchOver(worker, _, outcome):
            return ("over", worker, outcome.value)
        case Pause(worker, beside):
            return ("pause", worker, beside)
        case Continue(worker):
            return ("continue", worker)


def broke(name: str, *blamed: str, fault: Fault = Fault.DIED, **fields: Any) -> Failed:
    return Failed(name, fault, blamed, **fields)


def load(used: int = 0, seen_us: int = 0, **fields: Any) -> Load:
    values = {"running": 0, "waiting": 0, "used_tokens": used, "total_tokens": used}
    return Load(seen_us=seen_us, **(values | fields))
