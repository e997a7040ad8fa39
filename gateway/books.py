"""The core's records: one ticket a job and one lane a model."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.agenda import Agenda
from gateway.lifecycle import State, Step, advance
from gateway.servers import Candidates, Own
from policies.breaker import Breaker
from policies.events import Reason
from policies.ledger import Ledger
from policies.order import Key, Movement, Order, Outlook
from policies.queue import KeyedHeap
from policies.retry import continued
from policies.types import Job, Kind, Resume

_OFFLINE = Kind.OFFLINE


class Ticket:
    """Where one job stands, and what is booked for it."""

    __slots__ = (
        "ahead_tokens",
        "attempt",
        "avoid",
        "booked_context",
        "booked_prefill",
        "booked_reserved",
        "decode",
        "displaced",
        "first_us",
        "generated",
        "grown_us",
        "job",
        "leaves",
        "looked_us",
        "made",
        "part_on",
        "parts",
        "patience_us",
        "preemptions",
        "prefill",
        "resumes",
        "sent_to",
        "sent_us",
        "stands_aside",
        "state",
        "told_us",
        "took",
        "trials",
        "upto",
        "waits_for",
        "whole",
    )

    def __init__(self, job: Job) -> None:
        self.job = job
        self.patience_us = job.give_up_us - job.arrival_us
        self.state = State.QUEUED
        self.attempt = 0
        self.prefill: Ledger | None = None
        self.decode: Ledger | None = None
        self.avoid: tuple[str, ...] = ()
        self.resumes = False
        self.preemptions = 0
        self.displaced = 0
        """How many of them were for a more urgent prompt."""
        self.leaves = ""
        """The server that it was pulled from: others with room come first."""
        self.made = 0
        """Tokens of its preempted attempts that were kept."""
        self.upto = 0
        """What is sent of its prompt now, where it goes out in parts; 0: all."""
        self.part_on = ""
        self.parts = 0
        """How many are computed."""
        self.stands_aside = False
        """What it waits for is a turn of its own: others may go meanwhile."""
        self.waits_for = ""
        """The server that holds its beginning and has no room: others go elsewhere."""
        self.ahead_tokens = 0
        """Its own and what was before it, when it was sent."""
        self.whole = False
        """It cannot be cut."""
        self.took = 0
        """Others that were taken off their servers for this one."""
        self.sent_to: Ledger | None = None
        self.sent_us = self.told_us = self.looked_us = 0
        self.trials: tuple[tuple[Breaker, int], ...] = ()
        self.generated = 0
        self.first_us = self.grown_us = 0
        """When the first token of this attempt came, and when the latest was told."""
        self.booked_prefill = 0
        self.booked_context = 0
        self.booked_reserved = 0

    def step(self, step: Step) -> None:
        self.state = advance(self.state, step)

    @property
    def tpot_us(self) -> int:
        return self.job.tpot_us

    @property
    def is_placed(self) -> bool:
        return self.decode is not None

    @property
    def may_yield(self) -> bool:
        """Whether its client would not notice."""
        if self.state is State.PREFILL:
            return True
        return self.state is State.DECODE and self.job.resume is not Resume.UNTIL_SHOWN

    @property
    def why_again(self) -> Reason:
        """Why it goes to servers once more."""
        if self.resumes:
            return Reason.RESUME
        return Reason.RETRY if self.attempt > 1 else Reason.REQUEUED

    @property
    def sent_job(self) -> Job:
        """What its servers are asked for now: a part has an answer of one token."""
        if not self.upto:
            return self.job
        return self.job._replace(prompt_tokens=self.upto, max_tokens=1)

    def waits_anew(self, now_us: int) -> None:
        """What its servers have computed of it is not thrown away for how long that took."""
        if self.job.kind is Kind.ONLINE:
            until_us = max(self.job.give_up_us, now_us + self.patience_us)
            self.job = self.job._replace(give_up_us=until_us)

    def part_done(self, now_us: int, *, is_cut: bool, counted_tokens: int) -> None:
        """It queues again with what its server has cached now; that was no attempt."""
        if self.state is not State.YIELDING:
            self.step(Step.PREEMPTED)
        self.step(Step.RETURNED)
        if is_cut:
            self.parts += 1
            tokens = counted_tokens or self.job.prompt_tokens
            cached = min(self.upto, tokens - 1)
            self.job = self.job._replace(
                prompt_tokens=tokens, cached_tokens=cached, cached_on=self.part_on
            )
        self.whole = not is_cut
        self.waits_anew(now_us)
        self.release()
        self.attempt -= 1

    def makes_way(self, job: Job) -> None:
        """For a more urgent prompt; the job queues again with what its server has cached."""
        self.step(Step.PREEMPTED)
        self.job = job
        self.displaced += 1

    def returned(self, generated: int, now_us: int) -> None:
        """Preempted and back: that was no attempt that failed."""
        self.step(Step.RETURNED)
        self.release()
        self.job = continued(self.job, generated, now_us)
        if self.displaced:
            self.waits_anew(now_us)
        self.resumes = self.resumes or generated > 0
        self.made += generated
        self.preemptions += 1
        self.attempt -= 1

    def book(self, prefill: Ledger, decode: Ledger, reserved: int, now_us: int) -> None:
        job = self.sent_job
        self.prefill, self.decode = prefill, decode
        self.sent_to = prefill
        self.part_on = prefill.worker.name if self.upto else ""
        self.booked_prefill = prefill.uncached(job)
        self.booked_context, self.booked_reserved = job.prompt_tokens, reserved
        self.generated = self.told_us = self.first_us = self.grown_us = 0
        self.leaves = ""
        prefill.add_prefill(self.booked_prefill, now_us)
        self.ahead_tokens = prefill.prefill_tokens
        if job.prefixes:
            prefill.prefixes.add(job.prefixes)
        decode.add_decode(self.booked_context, reserved)
        decode.running[job.id] = self
        if job.kind is _OFFLINE:
            prefill.offline.add_prefill(self.booked_prefill)
            decode.offline.add(self.booked_context, reserved)
        else:
            decode.online.came(reserved, job.tpot_us, now_us)
        self.sent_us = now_us
        self.trials = ()
        decode.dispatched += 1
        if prefill is not decode:
            prefill.dispatched += 1
        if prefill.breaker.open_until_us or decode.breaker.open_until_us:
            self._try_out((decode,) if prefill is decode else (prefill, decode))

    def _try_out(self, ledgers: tuple[Ledger, ...]) -> None:
        for breaker in (e.breaker for e in ledgers if e.breaker.open_until_us):
            if trial := breaker.try_out():
                self.trials += ((breaker, trial),)

    def end_trials(self) -> None:
        """The attempt is over for a reason that says nothing about the servers on trial."""
        for breaker, trial in self.trials:
            breaker.gave_no_verdict(trial)
        self.trials = ()

    def prefilled(self, now_us: int) -> None:
        if self.prefill is not None:
            self.prefill.prefilled(self.booked_prefill, now_us)
            self._leave_prefill(self.prefill)

    def grow(self, generated: int, now_us: int) -> None:
        """Tokens came: the context grows, and the reservation when the answer outgrows it."""
        decode, fresh = self.decode, generated - self.generated
        if decode is None or fresh <= 0:
            return
        self.generated, self.grown_us = generated, now_us
        watched = decode.offline.decodes or decode.shares or decode.online.last_pace_us
        if watched and self.job.kind is not _OFFLINE:
            if self.told_us:
                decode.paced(now_us - self.told_us, fresh, now_us)
            self.told_us = now_us
        else:
            self.told_us = 0  # what comes until it is told again is not in its tokens
        self.booked_context += fresh
        paces = decode.paces
        if paces.watched is self or paces.watched is None:
            paces.told(self, decode.running.values(), now_us)
        outgrown = self.booked_context - self.booked_reserved
        if outgrown <= 0:
            decode.grow_decode(fresh, 0)
        else:
            self.booked_reserved += outgrown
            decode.grow_decode(fresh, outgrown)
        if self.job.kind is _OFFLINE:
            decode.offline.context_tokens += fresh
            decode.offline.reserved_tokens += max(0, outgrown)

    def free_prefill(self) -> None:
        if self.prefill is not None:
            self.prefill.end_prefill(self.booked_prefill)
            self._leave_prefill(self.prefill)

    def _leave_prefill(self, prefill: Ledger) -> None:
        if self.job.kind is _OFFLINE:
            prefill.offline.end_prefill(self.booked_prefill)
        self.prefill = None

    def release(self) -> None:
        self.free_prefill()
        self.upto, self.part_on = 0, ""
        if self.decode is not None:
            self.decode.end_decode(self.booked_context, self.booked_reserved)
            self.decode.running.pop(self.job.id, None)
            self.decode.paces.left(self)
            if self.job.kind is _OFFLINE:
                self.decode.offline.end(self.booked_context, self.booked_reserved)
            else:
                self.decode.online.went(self.job.tpot_us)
            self.decode = None


@dataclass(slots=True)
class Bucket:
    """What a queue knows of its short prompts that are held back."""

    since_us: int | None = None
    """When the first of them might have gone."""
    opened_us: int = -1
    """In the instant in which it is opened, nobody is held back."""

    def open(self, now_us: int) -> None:
        self.since_us, self.opened_us = None, now_us


class Lane:
    """The queues of one model: jobs of different models never wait for each other."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.online: KeyedHeap[Key] = KeyedHeap()
        self.offline: KeyedHeap[Key] = KeyedHeap()
        self.waiting = {Kind.ONLINE: self.online, Kind.OFFLINE: self.offline}
        self.aside: dict[Kind, dict[str, None]] = {kind: {} for kind in Kind}
        """Jobs that no server in rotation could take: they must not block those that can go."""
        self.waiting_tokens = dict.fromkeys(Kind, 0)
        self.last_key: dict[Kind, Key] = {}
        self.buckets = {kind: Bucket() for kind in Kind}
        self._moving: dict[Kind, Movement] = {}
        self.own: dict[Kind, Own] = {}
        """Its servers, until the fleet changes."""
        self.all: Candidates | None = None

    def would_be_first(self, job: Job, order: Order) -> bool:
        """Of its kind; a key that moves is not known before its time."""
        first = self.waiting[job.kind].first_key()
        return first is None or (order.moves is None and order.key(job) < first)

    def __len__(self) -> int:
        return sum(self.queued(kind) for kind in Kind)

    def queued(self, kind: Kind) -> int:
        return len(self.waiting[kind].entries) + len(self.aside[kind])

    def tokens_before(self, kind: Kind) -> int:
        """Prompt tokens that wait before one more job of this kind, if it is the last."""
        online = self.waiting_tokens[Kind.ONLINE]
        return online if kind is Kind.ONLINE else online + self.waiting_tokens[Kind.OFFLINE]

    def open_bucket(self, kind: Kind, agenda: Agenda, now_us: int) -> None:
        """Somebody goes: who is next may go with it."""
        self.buckets[kind].open(now_us)
        agenda.held.discard(f"{kind}/{self.model}")

    def put(self, job: Job, order: Order, outlook: Outlook) -> None:
        kind = job.kind
        heap = self.waiting[kind]
        if order.moves is None:
            key = order.key(job)
        else:
            moving = self._movement(kind, order.moves)
            moving.add(job)
            key = moving.key(job, order, outlook)
        if not heap.entries or key > self.last_key[kind]:
            self.last_key[kind] = key
        heap.put(job.id, key)
        self.waiting_tokens[kind] += job.prompt_tokens

    def is_last(self, job: Job, order: Order) -> bool:
        """Whether it would go after all that wait; where keys move, that is not said."""
        return order.moves is None and order.key(job) >= self.last_key[job.kind]

    def rekey(self, kind: Kind, order: Order, outlook: Outlook) -> None:
        """Some of the keys that have moved."""
        if order.moves is not None:
            self._movement(kind, order.moves).turn(self.waiting[kind], order, outlook)

    def first(self, kind: Kind, order: Order, outlook: Outlook) -> str | None:
        heap = self.waiting[kind]
        if order.moves is None:
            return heap.peek()
        return self._movement(kind, order.moves).first(heap, order, outlook)

    def _movement(self, kind: Kind, moves: type[Movement]) -> Movement:
        """A reload may change it: what waits is taken out and put in again then."""
        moving = self._moving.get(kind)
        if type(moving) is not moves:
            moving = self._moving[kind] = moves()
        return moving

    def take(self, job: Job) -> bool:
        kind = job.kind
        if not self.waiting[kind].discard(job.id):
            return self.aside[kind].pop(job.id, job) is None
        if (moving := self._moving.get(kind)) is not None:
            moving.discard(job)
        self.waiting_tokens[kind] -= job.prompt_tokens
        return True

    def set_aside(self, job: Job) -> None:
        self.take(job)
        self.aside[job.kind][job.id] = None

    def jobs(self, kind: Kind) -> list[str]:
        return [*self.waiting[kind], *self.aside[kind]]
