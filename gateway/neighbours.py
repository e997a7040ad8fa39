"""Servers that share one GPU: which of them stand still for the online work beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.agenda import Agenda
from gateway.books import Ticket
from gateway.preemption import Preemptor
from gateway.servers import Fleet
from policies.events import Continue, Decision, Pause, PauseRefused
from policies.ledger import Ledger
from policies.standstill import Standstill
from policies.types import Pool, Worker


class _Gpu:
    """The servers of one host. Its relaxed ones are held and let go together."""

    __slots__ = ("empties", "held_us", "ledgers", "paused", "prompts")

    def __init__(self) -> None:
        self.ledgers: list[Ledger] = []
        self.prompts: list[Ticket] = []
        """Online ones whose first token is in danger."""
        self.held_us: int | None = None
        """Since when the relaxed ones get nothing new."""
        self.paused: list[Ledger] = []
        self.empties = False
        """What they have goes elsewhere."""

    def busy_beside(self, ledger: Ledger) -> bool:
        return any(
            other is not ledger and not other.is_empty and other not in self.paused
            for other in self.ledgers
        )


class Neighbours:
    """Looked at in every call of the core while servers share GPUs.

    A server is paused only while an online job is on another one of its GPU, and no longer than
    the rule says: then it goes on, and its offline jobs are taken off it as fast as the budget of
    aborts allows. It gets nothing new until the danger is over.
    """

    def __init__(
        self,
        fleet: Fleet,
        rule: Standstill | None,
        preemptor: Preemptor,
        agenda: Agenda,
        freed: Callable[[], None],
        say: Callable[[Decision], None],
    ) -> None:
        self.rule = rule
        self._fleet = fleet
        self._preemptor = preemptor
        self._agenda = agenda
        self._freed = freed
        self._say = say
        self.gpus: dict[str, _Gpu] = {}
        """Of those that are shared, by host."""
        self.is_asked = False
        """Online work has gone to one of them since the last look."""

    # Which servers there are.

    def regroup(self) -> None:
        """Servers have come or gone. Who is alone on its GPU has nobody to stand back for."""
        hosts: dict[str, list[Ledger]] = {}
        for name in sorted(self._fleet.ledgers):
            ledger = self._fleet.ledgers[name]
            ledger.shares = False
            if ledger.worker.host:
                hosts.setdefault(ledger.worker.host, []).append(ledger)
        before, self.gpus = self.gpus, {}
        for host, ledgers in hosts.items():
            if len(ledgers) > 1:
                gpu = before.pop(host) if host in before else _Gpu()
                self.gpus[host] = gpu
                self._settle(gpu, ledgers)
        for gpu in before.values():
            self._let_go(gpu)

    def _settle(self, gpu: _Gpu, ledgers: list[Ledger]) -> None:
        for gone in gpu.ledgers:
            if gone not in ledgers:
                self._go_on(gpu, [gone])
                gone.stands_back = False
        gpu.ledgers = ledgers
        for ledger in ledgers:
            ledger.shares = True

    def came(self, worker: Worker) -> None:
        """It may stand still since an earlier life of the gateway's, or have lost its own."""
        self.regroup()
        if (gpu := self.gpus.get(worker.host)) is not None:
            gpu.paused = [e for e in gpu.paused if e.worker.name != worker.name]
            self._say(Continue(worker.name))

    def refused(self, event: PauseRefused, now_us: int) -> None:
        """It cannot be paused: its offline work goes elsewhere instead."""
        for gpu in self.gpus.values():
            here = [e for e in gpu.paused if e.worker.name == event.worker]
            if here:
                gpu.empties = True
                gpu.paused = [e for e in gpu.paused if e not in here]

    # Who stands still.

    def sent(self, ticket: Ticket, prefill: Ledger, now_us: int) -> None:
        """An online job has gone to a server that shares its GPU."""
        self.is_asked = True
        gpu = self.gpus.get(prefill.worker.host)
        if gpu is None or self.rule is None:
            return
        beside = len(_relaxed(gpu, [prefill]))
        if self.rule.is_late(ticket.job, prefill, beside, now_us):
            gpu.prompts.append(ticket)

    def look(self, now_us: int) -> None:
        self.is_asked = False
        for gpu in self.gpus.values():
            online = [e for e in gpu.ledgers if _is_online(e)]
            if self.rule is not None and online:
                self._look_at(gpu, online, self.rule, now_us)
            elif gpu.held_us is not None:
                self._let_go(gpu)
            for ledger in gpu.ledgers:
                ledger.crowded = ledger.crowded or gpu.busy_beside(ledger)

    def _look_at(self, gpu: _Gpu, online: list[Ledger], rule: Standstill, now_us: int) -> None:
        relaxed = _relaxed(gpu, online)
        beside = len(relaxed)
        gpu.prompts = [it for it in gpu.prompts if it.prefill in gpu.ledgers]
        self._go_on(gpu, [e for e in gpu.paused if e not in relaxed])
        if gpu.held_us is None:
            in_danger = [e for e in online if gpu.prompts or rule.is_in_danger(e, beside)]
            if in_danger and relaxed:
                gpu.held_us = now_us
                self._keep(gpu, relaxed, in_danger[0], rule, now_us)
                _pace_anew(online)
        elif now_us - gpu.held_us >= rule.shortest_us and self._is_calm(gpu, online, beside):
            self._let_go(gpu)
            _pace_anew(online)
        else:
            self._keep(gpu, relaxed, online[0], rule, now_us)

    def _is_calm(self, gpu: _Gpu, online: list[Ledger], beside: int) -> bool:
        rule = self.rule
        return rule is None or (not gpu.prompts and all(rule.is_calm(e, beside) for e in online))

    def _keep(
        self, gpu: _Gpu, relaxed: list[Ledger], beside: Ledger, rule: Standstill, now_us: int
    ) -> None:
        ends_us = (gpu.held_us or 0) + rule.longest_us
        if now_us >= ends_us and not gpu.empties:
            gpu.empties = True
            self._go_on(gpu, gpu.paused)
        for ledger in relaxed:
            ledger.stands_back = True
            if gpu.empties:
                self._preemptor.empty(ledger, now_us)
            elif not ledger.is_empty and ledger not in gpu.paused:
                gpu.paused.append(ledger)
                self._say(Pause(ledger.worker.name, beside.worker.name))
                self._agenda.mind(ends_us)

    def _let_go(self, gpu: _Gpu) -> None:
        self._go_on(gpu, gpu.paused)
        for ledger in gpu.ledgers:
            ledger.stands_back = False
        gpu.held_us, gpu.empties = None, False
        self._freed()

    def _go_on(self, gpu: _Gpu, ledgers: Iterable[Ledger]) -> None:
        going = [e for e in ledgers if e in gpu.paused]
        for ledger in going:
            self._say(Continue(ledger.worker.name))
        gpu.paused = [e for e in gpu.paused if e not in going]

    def due_us(self) -> list[int]:
        """When those that stand still have done so for long enough."""
        if self.rule is None:
            return []
        longest_us = self.rule.longest_us
        gpus = self.gpus.values()
        return [it.held_us + longest_us for it in gpus if it.paused and it.held_us is not None]


def _is_online(ledger: Ledger) -> bool:
    return ledger.online.count > 0 or ledger.prefills > ledger.offline.prefills


def _relaxed(gpu: _Gpu, online: list[Ledger]) -> list[Ledger]:
    """Who may have to stand still. One that is about to change its role has to end its work."""
    return [
        e
        for e in gpu.ledgers
        if e.worker.pool is Pool.RELAXED and e not in online and not e.switching
    ]


def _pace_anew(online: list[Ledger]) -> None:
    """It was another one with the neighbours in the other state."""
    for ledger in online:
        ledger.online.forget_pace()
