"""The core's records: one ticket a job, one lane a model, and the fleet they are booked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.lifecycle import State, Step, advance
from policies.breaker import Breaker, BreakerRule
from policies.ledger import Ledger
from policies.order import Key
from policies.pools import Pools
from policies.queue import KeyedHeap
from policies.steps import Costs
from policies.types import Job, Kind, Role, Worker


class Ticket:
    """Where one job stands, and what is booked for it."""

    __slots__ = (
        "attempt",
        "avoid",
        "booked_context",
        "booked_prefill",
        "booked_reserved",
        "decode",
        "generated",
        "job",
        "prefill",
        "resumes",
        "sent_us",
        "state",
        "trials",
    )

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = State.QUEUED
        self.attempt = 0
        self.prefill: Ledger | None = None
        self.decode: Ledger | None = None
        self.avoid: tuple[str, ...] = ()
        self.resumes = False
        self.sent_us = 0
        self.trials: tuple[Breaker, ...] = ()
        self.generated = 0
        self.booked_prefill = 0
        self.booked_context = 0
        self.booked_reserved = 0

    def step(self, step: Step) -> None:
        self.state = advance(self.state, step)

    @property
    def is_placed(self) -> bool:
        return self.decode is not None

    def book(self, prefill: Ledger, decode: Ledger, reserved: int, now_us: int) -> None:
        job = self.job
        self.prefill, self.decode = prefill, decode
        self.booked_prefill = job.prompt_tokens - job.cached_tokens
        self.booked_context, self.booked_reserved = job.prompt_tokens, reserved
        self.generated = 0
        prefill.add_prefill(self.booked_prefill, now_us)
        decode.add_decode(self.booked_context, reserved)
        self.sent_us = now_us
        self.trials = ()
        ledgers = (prefill,) if prefill is decode else (prefill, decode)
        for ledger in ledgers:
            ledger.dispatched += 1
            if not ledger.breaker.is_closed and ledger.breaker.try_out():
                self.trials += (ledger.breaker,)

    def end_trials(self) -> None:
        """The attempt is over for a reason that says nothing about the servers on trial."""
        for breaker in self.trials:
            breaker.gave_no_verdict()
        self.trials = ()

    def prefilled(self, now_us: int) -> None:
        if self.prefill is not None:
            self.prefill.prefilled(self.booked_prefill, now_us)
            self.prefill = None

    def grow(self, generated: int) -> None:
        """Tokens came: the context grows, and the reservation when the answer outgrows it."""
        if self.decode is None or generated <= self.generated:
            return
        context = self.job.prompt_tokens + generated
        reserved = max(self.booked_reserved, context)
        self.decode.context_tokens += context - self.booked_context
        self.decode.reserved_tokens += reserved - self.booked_reserved
        self.booked_context, self.booked_reserved, self.generated = context, reserved, generated

    def free_prefill(self) -> None:
        if self.prefill is not None:
            self.prefill.end_prefill(self.booked_prefill)
            self.prefill = None

    def release(self) -> None:
        self.free_prefill()
        if self.decode is not None:
            self.decode.end_decode(self.booked_context, self.booked_reserved)
            self.decode = None


@dataclass(slots=True)
class Candidates:
    """The servers that one kind of job may use, in the order of their names."""

    prefills: list[Ledger]
    decodes: list[Ledger]
    unified: list[Ledger]

    @property
    def can_serve(self) -> bool:
        return bool(self.unified or (self.prefills and self.decodes))

    def in_rotation(self, now_us: int) -> Candidates:
        return self._only(lambda ledger: ledger.usable(now_us))

    def without(self, names: tuple[str, ...]) -> Candidates:
        """A leg that nobody else can take stays with those that can."""
        others = self._only(lambda ledger: ledger.worker.name not in names)
        others.prefills = others.prefills or self.prefills
        others.decodes = others.decodes or self.decodes
        return others

    def _only(self, wanted: Callable[[Ledger], bool]) -> Candidates:
        return Candidates(
            prefills=[e for e in self.prefills if wanted(e)],
            decodes=[e for e in self.decodes if wanted(e)],
            unified=[e for e in self.unified if wanted(e)],
        )


class Lane:
    """The queues of one model: jobs of different models never wait for each other."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._online: KeyedHeap[Key] = KeyedHeap()
        self._offline: KeyedHeap[Key] = KeyedHeap()
        self.waiting = {Kind.ONLINE: self._online, Kind.OFFLINE: self._offline}
        self.aside: dict[Kind, dict[str, None]] = {kind: {} for kind in Kind}
        """Jobs that no server in rotation could take: they must not block those that can go."""
        self.waiting_tokens = dict.fromkeys(Kind, 0)
        self.last_key: dict[Kind, Key] = {}
        self.candidates: dict[Kind, Candidates] = {}

    @property
    def is_quiet(self) -> bool:
        """Nobody waits for a server."""
        return not (self._online or self._offline)

    def __len__(self) -> int:
        return sum(self.queued(kind) for kind in Kind)

    def queued(self, kind: Kind) -> int:
        return len(self.waiting[kind]) + len(self.aside[kind])

    def put(self, job: Job, key: Key) -> None:
        heap = self.waiting[job.kind]
        self.last_key[job.kind] = max(key, self.last_key[job.kind]) if heap else key
        heap.put(job.id, key)
        self.waiting_tokens[job.kind] += job.prompt_tokens

    def take(self, job: Job) -> bool:
        if not self.waiting[job.kind].discard(job.id):
            return self.aside[job.kind].pop(job.id, job) is None
        self.waiting_tokens[job.kind] -= job.prompt_tokens
        return True

    def set_aside(self, job: Job) -> None:
        self.take(job)
        self.aside[job.kind][job.id] = None

    def jobs(self, kind: Kind) -> list[str]:
        return [*self.waiting[kind], *self.aside[kind]]


class Fleet:
    """Every server's ledger, and which of them serve a model and a kind."""

    def __init__(self, breaker: BreakerRule, pools: Pools, costs: Costs) -> None:
        self._breaker = breaker
        self._pools = pools
        self._costs = costs
        self._retired: dict[str, Ledger] = {}
        self.ledgers: dict[str, Ledger] = {}

    def adopt(self, breaker: BreakerRule, pools: Pools, costs: Costs) -> None:
        self._breaker, self._pools, self._costs = breaker, pools, costs
        for ledger in self.ledgers.values():
            ledger.breaker.rule = breaker
            ledger.predict_by(costs.of(ledger.worker))

    def add(self, worker: Worker) -> None:
        """A server that comes back finds the work in its books that it still has."""
        ledger = self.ledgers.get(worker.name)
        if ledger is None:
            self.ledgers[worker.name] = ledger = self._reopened(worker)
        elif ledger.worker.url != worker.url:
            ledger.breaker = Breaker(self._breaker)
        if ledger.up:
            # Announced while it was there already: whoever drained it wants it back.
            ledger.draining = False
        ledger.adopt(worker)
        ledger.predict_by(self._costs.of(worker))
        ledger.up = True

    def _reopened(self, worker: Worker) -> Ledger:
        ledger = self._retired.pop(worker.name, None)
        if ledger is None or ledger.worker.url != worker.url:
            return Ledger(worker, Breaker(self._breaker))
        ledger.breaker.rule = self._breaker
        ledger.draining = False
        return ledger

    def remove(self, name: str) -> bool:
        if (ledger := self.ledgers.pop(name, None)) is None:
            return False
        ledger.forget_report()
        self._retired = {n: e for n, e in self._retired.items() if not e.is_empty}
        self._retired[name] = ledger
        return True

    @property
    def takes_any_model(self) -> bool:
        return any(not ledger.worker.model for ledger in self.ledgers.values())

    def candidates(self, model: str, kind: Kind) -> Candidates:
        """The order of names makes every tie the same everywhere."""
        workers = [
            self.ledgers[name].worker
            for name in sorted(self.ledgers)
            if self._serves(self.ledgers[name].worker, model)
        ]
        prefills = [self.ledgers[w.name] for w in self._pools.prefills(kind, workers)]
        decodes = [self.ledgers[w.name] for w in self._pools.decodes(kind, workers)]
        return Candidates(
            prefills=[e for e in prefills if e.worker.role is Role.PREFILL],
            decodes=decodes,
            unified=[e for e in prefills if e.worker.role is Role.UNIFIED],
        )

    @staticmethod
    def _serves(worker: Worker, model: str) -> bool:
        """A server that did not name its model takes any, and so does a job."""
        return not model or not worker.model or worker.model == model
