"""The core's records: one ticket a job, one lane a model, and the fleet they are booked on."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.lifecycle import State, Step, advance
from policies.breaker import Breaker, BreakerRule
from policies.ledger import Ledger
from policies.order import Key
from policies.pools import Pools
from policies.queue import KeyedHeap
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
        "state",
    )

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = State.QUEUED
        self.attempt = 0
        self.prefill: Ledger | None = None
        self.decode: Ledger | None = None
        self.avoid: tuple[str, ...] = ()
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
        for ledger in (prefill,) if prefill is decode else (prefill, decode):
            ledger.dispatched += 1
            ledger.breaker.try_out()

    def end_prefill(self, now_us: int) -> None:
        if self.prefill is not None:
            self.prefill.end_prefill(self.booked_prefill, now_us)
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

    def release(self, now_us: int) -> None:
        self.end_prefill(now_us)
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

    def usable(self, now_us: int) -> bool:
        if any(ledger.usable(now_us) for ledger in self.unified):
            return True
        return any(ledger.usable(now_us) for ledger in self.prefills) and any(
            ledger.usable(now_us) for ledger in self.decodes
        )


class Lane:
    """The queues of one model: jobs of different models never wait for each other."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._online: KeyedHeap[Key] = KeyedHeap()
        self._offline: KeyedHeap[Key] = KeyedHeap()
        self.waiting = {Kind.ONLINE: self._online, Kind.OFFLINE: self._offline}
        self.waiting_tokens = 0
        self.last_key: dict[Kind, Key] = {}
        self.candidates: dict[Kind, Candidates] = {}

    @property
    def is_quiet(self) -> bool:
        """Nobody waits."""
        return not (self._online or self._offline)

    def put(self, job: Job, key: Key) -> None:
        heap = self.waiting[job.kind]
        self.last_key[job.kind] = max(key, self.last_key[job.kind]) if heap else key
        heap.put(job.id, key)
        self.waiting_tokens += job.prompt_tokens

    def take(self, job: Job) -> bool:
        if not self.waiting[job.kind].discard(job.id):
            return False
        self.waiting_tokens -= job.prompt_tokens
        return True


class Fleet:
    """Every server's ledger, and which of them serve a model and a kind."""

    def __init__(self, breaker: BreakerRule, pools: Pools) -> None:
        self._breaker = breaker
        self._pools = pools
        self.ledgers: dict[str, Ledger] = {}

    def adopt(self, breaker: BreakerRule, pools: Pools) -> None:
        self._breaker, self._pools = breaker, pools

    def add(self, worker: Worker) -> None:
        ledger = self.ledgers.get(worker.name)
        if ledger is None:
            self.ledgers[worker.name] = Ledger(worker, Breaker(self._breaker))
        else:
            if ledger.worker.url != worker.url:
                ledger.breaker = Breaker(self._breaker)
            ledger.worker, ledger.up, ledger.draining = worker, True, False

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
