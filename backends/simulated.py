"""The engine model as a backend in virtual time: what servers would answer, without sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from backends.addresses import respelled
from backends.base import Post
from backends.counters import counters_of
from backends.engine import Engine, Prompt, Refused, Request, Resident
from backends.trouble import Blame, Trouble, blamed_by, fault_of, judge
from policies.clock import Clock
from policies.events import (
    Continue,
    Dispatch,
    Fail,
    Failed,
    Fault,
    Finished,
    FirstToken,
    Freed,
    Load,
    PartDone,
    Pause,
    Preempt,
    Preempted,
    PrefillDone,
    Progress,
    Reject,
)
from policies.types import Job, Kind, Resume, Role, Worker

_PRIORITY = {Kind.ONLINE: 1, Kind.OFFLINE: 0}
"""Read by servers that order by priority, and ignored by the others."""
FIRST_TOKEN_S: Mapping[Kind, float] = {Kind.ONLINE: 60.0, Kind.OFFLINE: 600.0}
"""From dispatch until the servers of a request without a token are given up: the gateway's own."""
_LOST_PAIR = frozenset({Fault.TIMEOUT, Fault.PAIRING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """What the gateway and the network between it and the servers take."""

    request_s: float = 0.0005
    """From a decision until the server's front has the request."""
    answer_s: float = 0.0005
    """From a token at the server until the gateway knows of it."""
    tick_s: float = 0.1
    """How often progress is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What only the servers may know of a job: its tokens, and how long its answer will be."""

    prompt: Prompt
    answer_tokens: int


class Grid:
    """A clock of whole microseconds: what is due in one of them is done in the order it was asked.

    Event loops leave the order of equal deadlines open, and sums of floats miss each other.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: dict[int, list[_Entry]] = {}

    def time(self) -> float:
        return round(self._clock.time() * 1e6) / 1e6

    def call_at(self, when: float, callback: Callable[..., object], /, *args: Any) -> _Entry:
        entry = _Entry(callback, args)
        us = round(when * 1e6)
        if (others := self._due.get(us)) is not None:
            others.append(entry)
        else:
            self._due[us] = [entry]
            self._clock.call_at(max(us / 1e6, self._clock.time()), self._fire, us)
        return entry

    def _fire(self, us: int) -> None:
        for entry in self._due.pop(us):
            if entry.callback is not None:
                entry.callback(*entry.args)


class _Entry:
    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback = None


class _Leg:
    """One side of an attempt, as its server's listener; both sides of a unified server."""

    __slots__ = ("attempt", "engine", "is_prefill", "resident")

    def __init__(self, attempt: _Attempt, engine: Engine, *, is_prefill: bool) -> None:
        self.attempt = attempt
        self.engine = engine
        self.is_prefill = is_prefill
        self.resident: Resident | None = None

    def tokens(self, resident: Resident) -> None:
        if not self.is_prefill:
            self.attempt.later(self.attempt.first_token)

    def finished(self, resident: Resident, reason: dict[str, Any]) -> None:
        self.resident = None
        self.attempt.is_complete |= not self.is_prefill and reason["type"] != "abort"
        self.attempt.account(resident)
        self.attempt.later(self.attempt.leg_ended, self, resident.generated, reason)

    def lost(self, resident: Resident) -> None:
        self.resident = None
        self.attempt.account(resident)
        self.attempt.later(self.attempt.leg_lost, self, resident.generated)


class _Attempt:
    """One dispatch; over as soon as the gateway would take it to be over."""

    __slots__ = (
        *("_backend", "_flows", "decode", "is_complete", "is_part", "job", "over", "prefill"),
        *("sent_s", "told_tokens"),
    )

    def __init__(
        self,
        backend: SimulatedBackend,
        job: Job,
        prefill: Engine | None,
        decode: Engine,
        sent_s: float,
        *,
        is_part: bool = False,
    ) -> None:
        self._backend = backend
        self.is_part = is_part
        """Of a prompt: its token is for nobody."""
        self.sent_s = sent_s
        self._flows = False
        self.job = job
        self.prefill = None if prefill is None else _Leg(self, prefill, is_prefill=True)
        self.decode = _Leg(self, decode, is_prefill=False)
        self.over = False
        self.is_complete = False
        """The answer has left its server."""
        self.told_tokens = 0

    @property
    def legs(self) -> list[_Leg]:
        return [self.decode] if self.prefill is None else [self.prefill, self.decode]

    @property
    def is_shown(self) -> bool:
        return self._flows and self.job.resume is Resume.UNTIL_SHOWN

    @property
    def tokens(self) -> int:
        resident = self.decode.resident
        return resident.generated if self._flows and resident is not None else 0

    def later(self, callback: Callable[..., None], *args: Any) -> None:
        self._backend.after(self._backend.delays.answer_s, callback, *args)

    def account(self, resident: Resident) -> None:
        if self._backend.on_leg_end is not None:
            self._backend.on_leg_end(self.job.id, resident)

    def send(self, request: Request) -> None:
        """Both legs at once, as the gateway does."""
        if self.over:
            return
        for leg in self.legs:
            try:
                leg.resident = leg.engine.submit(request, leg)
            except Refused as refused:
                trouble = judge(refused.status, refused.message, leg=self._side(leg))
                self.later(self._fail, leg, trouble, None, 0)

    def first_token(self) -> None:
        if not self.over and not self._flows and not self.is_part:
            self._flows = True
            self._backend.post(FirstToken(self.job.id))

    def leg_ended(self, leg: _Leg, generated: int, reason: dict[str, Any]) -> None:
        if reason["type"] == "abort":
            self._fail(leg, _judge_abort(reason, self._side(leg)), None, generated)
        elif leg.is_prefill and not self.over:
            self._backend.post(PrefillDone(self.job.id))
        elif not leg.is_prefill and not self.over:
            self.over = True
            if self.is_part:
                self._backend.part_done(self.job.id)
            else:
                self._backend.ended(self.job.id, Finished(self.job.id, generated))

    def leg_lost(self, leg: _Leg, generated: int) -> None:
        trouble = judge(502, "the connection was closed", leg=self._side(leg))
        self._fail(leg, trouble, Fault.DIED, generated)

    def _fail(self, leg: _Leg, trouble: Trouble, fault: Fault | None, generated: int) -> None:
        """A prefill server's last words do not count once tokens flow."""
        if self.over or (leg.is_prefill and self._flows):
            return
        self.close()
        failed = Failed(
            self.job.id,
            fault or fault_of(trouble),
            blamed_by(trouble, (self.prefill or self.decode).engine.name, self.decode.engine.name),
            generated if self._flows else 0,
        )
        self._backend.ended(self.job.id, failed)

    def check(self, now_s: float) -> None:
        """Before the KV has arrived nobody can tell which side hangs, so both are to blame."""
        if self.over or self._flows:
            return
        if now_s - self.sent_s > self._backend.first_token_s[self.job.kind]:
            open_legs = [leg for leg in self.legs if leg.resident is not None or not leg.is_prefill]
            blamed = tuple(leg.engine.name for leg in open_legs)
            self.close()
            self._backend.ended(self.job.id, Failed(self.job.id, Fault.TIMEOUT, blamed))

    def close(self) -> None:
        self.over = True
        self._backend.after(self._backend.delays.request_s, self._leave)

    def _leave(self) -> None:
        for leg in self.legs:
            if leg.resident is not None:
                leg.engine.leave(leg.resident)

    @staticmethod
    def _side(leg: _Leg) -> Blame:
        return Blame.PREFILL if leg.is_prefill else Blame.DECODE


class SimulatedBackend:
    """Answers dispatches with engines on a clock; the core and the driver see no difference."""

    def __init__(
        self,
        engines: Iterable[Engine],
        clock: Clock,
        delays: Delays | None = None,
        first_token_s: Mapping[Kind, float] = FIRST_TOKEN_S,
    ) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.delays = delays or Delays()
        self.first_token_s = first_token_s
        self.post: Post = _nobody
        self.on_leg_end: Callable[[str, Resident], object] | None = None
        """Told of every leg that is over at its server, for whoever keeps accounts."""
        self._clock = clock
        self._work: dict[str, Work] = {}
        self._live: dict[str, _Attempt] = {}
        self._spellings: dict[str, int] = {}
        """Of prefill servers that have lost pairs, how often they were named anew for it."""
        self._serials = count(1)
        self._ticking = False

    def connect(self, post: Post) -> None:
        self.post = post

    def open(self, job_id: str, work: Work) -> None:
        """Must come before the job does."""
        self._work[job_id] = work

    def __len__(self) -> int:
        """Jobs that have not ended."""
        return len(self._work)

    def generated(self, job_id: str) -> int:
        """Tokens of its present attempt that the gateway could know of."""
        attempt = self._live.get(job_id)
        if attempt is None:
            return 0
        attempt.decode.engine.catch_up()
        return attempt.tokens

    # What the driver asks for.

    def start(self, dispatch: Dispatch) -> None:
        job, serial = dispatch.job, next(self._serials)
        prefill = None if dispatch.prefill is None else self.engines[dispatch.prefill]
        now_s = self._clock.time()
        upto, decode = dispatch.upto, self.engines[dispatch.decode]
        attempt = _Attempt(self, job, prefill, decode, now_s, is_part=upto > 0)
        self._live[job.id] = attempt
        work = self._work[job.id]
        if upto:
            work = Work(prompt=work.prompt.cut(0, upto), answer_tokens=1)
        request = Request(
            rid=f"{serial:032x}",
            prompt=work.prompt,
            max_new_tokens=1 if upto else job.max_tokens,
            true_tokens=work.answer_tokens,
            priority=_PRIORITY[job.kind],
            is_online=job.kind is Kind.ONLINE,
            arrived_s=job.arrival_us / 1e6,
            ttft_s=(job.deadline_us - job.arrival_us) / 1e6 if job.kind is Kind.ONLINE else 0.0,
            tpot_s=job.tpot_us / 1e6,
            bootstrap_host=self._address_of(prefill) if prefill else "",
            bootstrap_port=prefill.config.bootstrap_port if prefill else None,
            bootstrap_room=serial if prefill else None,
        )
        self.after(self.delays.request_s, attempt.send, request)
        self._tick_on()

    def preempt(self, decision: Preempt) -> None:
        job = decision.job
        attempt = self._live.get(job.id)
        if attempt is None or attempt.is_complete or attempt.is_shown:
            return
        generated, lost = self.generated(job.id), 0
        if attempt.is_complete:  # in the steps just caught up with
            return
        if job.resume is not Resume.EXACT:
            generated, lost = 0, generated
        del self._live[job.id]
        attempt.close()
        self._grow(job.id, generated)
        self.post(Preempted(job.id, generated, lost))

    def pause(self, decision: Pause) -> None:
        self.after(self.delays.request_s, self.engines[decision.worker].pause, "in_place")

    def go_on(self, decision: Continue) -> None:
        self.after(self.delays.request_s, self.engines[decision.worker].resume)

    def stop(self, job: Job) -> None:
        attempt = self._live.pop(job.id, None)
        if attempt is not None:
            attempt.close()
        self._work.pop(job.id, None)
        self.post(Freed(job.id))

    def refuse(self, decision: Reject | Fail) -> None:
        self._work.pop(decision.job.id, None)

    # What attempts say.

    def ended(self, job_id: str, event: Finished | Failed) -> None:
        attempt = self._live.pop(job_id, None)
        if isinstance(event, Finished):
            self._work.pop(job_id, None)
        else:
            self._grow(job_id, event.generated)
            if attempt is not None and attempt.prefill is not None and event.fault in _LOST_PAIR:
                self._lost_pair(attempt.prefill.engine.name, event.blamed)
        self.post(event)

    def part_done(self, job_id: str) -> None:
        self._live.pop(job_id, None)
        self.post(PartDone(job_id))

    def _lost_pair(self, prefill: str, blamed: tuple[str, ...]) -> None:
        if prefill in blamed:
            self._spellings[prefill] = self._spellings.get(prefill, 0) + 1

    def _address_of(self, prefill: Engine) -> str:
        """As the live backend has it: a new spelling for each life, turn at the role and loss."""
        known_as = prefill.life + prefill.switches + self._spellings.get(prefill.name, 0)
        return respelled(prefill.config.bootstrap_host, known_as)

    def _grow(self, job_id: str, generated: int) -> None:
        """What was generated is part of the prompt of the next attempt."""
        if not generated:
            return
        work = self._work[job_id]
        self._work[job_id] = replace(
            work,
            prompt=work.prompt.grown(generated),
            answer_tokens=max(1, work.answer_tokens - generated),
        )

    def after(self, seconds: float, callback: Callable[..., object], *args: Any) -> None:
        self._clock.call_at(self._clock.time() + seconds, callback, *args)

    def _tick_on(self) -> None:
        if not self._ticking:
            self._ticking = True
            self.after(self.delays.tick_s, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        moved = []
        for engine in self.engines.values():
            engine.catch_up()
        for job_id, attempt in self._live.items():
            if (tokens := attempt.tokens) > attempt.told_tokens:
                attempt.told_tokens = tokens
                moved.append((job_id, tokens))
        if moved:
            self.post(Progress(tuple(moved)))
        now_s = self._clock.time()
        for attempt in list(self._live.values()):
            attempt.check(now_s)
        if self._live:
            self._tick_on()


def worker_of(engine: Engine) -> Worker:
    """What a probe would find out about it."""
    config = engine.config
    return Worker(
        name=config.name,
        url=f"sim://{config.name}",
        role=engine.role,
        model=config.model,
        host=config.host,
        bootstrap_host=config.bootstrap_host,
        bootstrap_port=config.bootstrap_port if engine.role is Role.PREFILL else None,
        kv_tokens=config.kv_tokens,
        max_running=config.max_running,
        chunk_tokens=config.chunk_tokens,
        page_size=config.page_tokens,
        orders_by_priority=config.priority,
    )


def load_of(engine: Engine, now_us: int) -> Load:
    """What a poll of /v1/loads would say."""
    report = engine.loads()
    return Load(
        seen_us=now_us,
        running=report["num_running_reqs"],
        waiting=report["num_waiting_reqs"],
        used_tokens=report["num_used_tokens"],
        total_tokens=report["num_total_tokens"],
        capacity_tokens=report["max_total_num_tokens"],
        max_running=report["max_running_requests"],
        waiting_uncached_tokens=report["num_waiting_uncached_tokens"],
        counters=counters_of([report]),
    )


def _judge_abort(reason: dict[str, Any], leg: Blame) -> Trouble:
    """Without a status, somebody asked for it."""
    status, message = reason["status_code"], reason["message"]
    if status is not None:
        return judge(status, message, leg=leg)
    return Trouble(status=499, message=message, retryable=False, blames=Blame.ABORTED)


def _nobody(event: object) -> None:
    raise RuntimeError(f"{event} before anyone listens")
