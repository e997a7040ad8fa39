"""The servers as the core knows them: their ledgers, what they serve, when their word is stale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.agenda import Due, passed
from policies.breaker import Breaker, BreakerRule
from policies.events import Load, StepsSeen
from policies.ledger import Ledger
from policies.pools import Pools
from policies.queue import KeyedHeap
from policies.steps import Costs
from policies.types import Kind, Pool, Role, Worker

_NEVER_US = 2**63


@dataclass(slots=True)
class Candidates:
    """The servers that one kind of job may use, in the order of their names."""

    prefills: list[Ledger]
    decodes: list[Ledger]
    unified: list[Ledger]

    @property
    def can_serve(self) -> bool:
        return bool(self.unified or (self.prefills and self.decodes))

    def has_usable(self, now_us: int) -> bool:
        """Whether a job could be sent now, if there were room."""
        if self.prefills and self.decodes:  # nearly always the first ones are
            if self.prefills[0].usable(now_us) and self.decodes[0].usable(now_us):
                return True
            if _some(self.prefills, now_us) and _some(self.decodes, now_us):
                return True
        return _some(self.unified, now_us)

    def has_relaxed(self, now_us: int) -> bool:
        """Whether one of those that decode is relaxed and in rotation, full or not."""
        return any(
            e.worker.pool is Pool.RELAXED and e.usable(now_us) for e in self.decodes + self.unified
        )

    def in_rotation(self, now_us: int) -> Candidates:
        return self.only(lambda ledger: ledger.usable(now_us))

    def apart_from(self, names: tuple[str, ...]) -> Candidates:
        return self.only(lambda ledger: ledger.worker.name not in names)

    def without(self, names: tuple[str, ...]) -> Candidates:
        """A leg that nobody else can take stays with those that can."""
        others = self.apart_from(names)
        others.prefills = others.prefills or self.prefills
        others.decodes = others.decodes or self.decodes
        return others

    def without_prefill(self, name: str) -> Candidates:
        """No prompt goes there; none may be left."""
        return self.only(lambda it: it.worker.name != name or it.worker.role is Role.DECODE)

    def only(self, wanted: Callable[[Ledger], bool]) -> Candidates:
        return Candidates(
            prefills=[e for e in self.prefills if wanted(e)],
            decodes=[e for e in self.decodes if wanted(e)],
            unified=[e for e in self.unified if wanted(e)],
        )


def _some(ledgers: list[Ledger], now_us: int) -> bool:
    return any(ledger.usable(now_us) for ledger in ledgers)


@dataclass(frozen=True, slots=True)
class Own:
    """What one kind of job uses while its pool can serve."""

    pool: Candidates
    """By which it is known whether the pool can."""
    with_lent: Candidates


class Fleet:
    """Every server's ledger, and which of them serve a model and a kind."""

    def __init__(self, breaker: BreakerRule, pools: Pools, costs: Costs) -> None:
        self._breaker = breaker
        self._pools = pools
        self._costs = costs
        self._retired: dict[str, Ledger] = {}
        self._stale: Due = KeyedHeap()
        """Servers, by when their last report is too old."""
        self.stale_us = _NEVER_US
        """No report is too old before this."""
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
        ledger.draining = ledger.switching = False
        return ledger

    def remove(self, name: str) -> bool:
        if (ledger := self.ledgers.pop(name, None)) is None:
            return False
        self._forget_report(ledger)
        self._retired = {n: e for n, e in self._retired.items() if not e.is_empty}
        self._retired[name] = ledger
        return True

    def silence(self, name: str) -> bool:
        """It does not answer; what it runs may go on."""
        if (ledger := self.ledgers.get(name)) is None:
            return False
        ledger.up = False
        self._forget_report(ledger)
        return True

    def correct(self, ledger: Ledger, load: Load, stale_us: int) -> None:
        """By the server's own report, which is believed until `stale_us`."""
        ledger.correct(load)
        self._stale.put(ledger.worker.name, (stale_us,))
        self.stale_us = min(self.stale_us, stale_us)

    def stepped(self, event: StepsSeen, now_us: int) -> None:
        """By its own report of single steps."""
        ledger = self.ledgers.get(event.worker)
        if ledger is not None and ledger.steps is not None and not ledger.crowded:
            ledger.steps.stepped(event.steps, now_us)
            ledger.line = None

    def forget_stale(self, now_us: int) -> bool:
        """Whether servers have fallen silent: the books alone go on."""
        names = list(passed(self._stale, now_us))
        for name in names:
            self.ledgers[name].forget_report()
        first = self._stale.first_key()
        self.stale_us = _NEVER_US if first is None else first[0]
        return bool(names)

    def _forget_report(self, ledger: Ledger) -> None:
        ledger.forget_report()
        self._stale.discard(ledger.worker.name)

    @property
    def has_tripped(self) -> bool:
        """A breaker is open, or waits for the verdict of a trial."""
        return any(not ledger.breaker.is_closed for ledger in self.ledgers.values())

    def changes_us(self, now_us: int) -> list[int]:
        """When servers change by themselves: a breaker may be tried, a report is too old."""
        breakers = [ledger.breaker for ledger in self.ledgers.values()]
        due = [us for breaker in breakers if (us := breaker.open_until_us) > now_us]
        if (first := self._stale.first_key()) is not None:
            due.append(first[0])
        return due

    @property
    def takes_any_model(self) -> bool:
        return any(not ledger.worker.model for ledger in self.ledgers.values())

    def own(self, model: str, kind: Kind) -> Own:
        """What a server can lend is known by its predicted steps alone."""
        workers = self._of(model)
        own = self._pools.servers(kind, workers)
        lent = self._pools.lent(kind, workers)
        lent = [w for w in lent if self.ledgers[w.name].steps is not None]
        pool = self._candidates(own)
        return Own(pool, self._candidates(own + lent) if lent else pool)

    def all_of(self, model: str) -> Candidates:
        """Whatever their pools are."""
        return self._candidates(self._of(model))

    def _of(self, model: str) -> list[Worker]:
        """A server that did not name its model takes any, and so does a job."""
        workers = [ledger.worker for ledger in self.ledgers.values()]
        return [w for w in workers if not model or not w.model or w.model == model]

    def _candidates(self, workers: list[Worker]) -> Candidates:
        """The order of names makes every tie the same everywhere. Half a pair is of no use, and
        must not be counted with those that are."""
        by_role: dict[Role, list[Ledger]] = {role: [] for role in Role}
        for name in sorted(worker.name for worker in workers):
            ledger = self.ledgers[name]
            by_role[ledger.worker.role].append(ledger)
        prefills, decodes = by_role[Role.PREFILL], by_role[Role.DECODE]
        if not prefills or not decodes:
            prefills, decodes = [], []
        return Candidates(prefills, decodes, by_role[Role.UNIFIED])
