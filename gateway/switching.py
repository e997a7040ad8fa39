"""Servers on their way to another role: out of rotation, emptied, switched, verified, back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from gateway.books import Ticket
from gateway.servers import Fleet
from policies.events import (
    Decision,
    Outcome,
    Reason,
    Recall,
    Release,
    RoleSwitched,
    SwitchOver,
    SwitchRole,
    SwitchWanted,
)
from policies.ledger import Ledger
from policies.types import Kind, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchRule:
    """How long each part of a switch may take."""

    hand_over_us: int = 5_000_000
    """Online requests that have not ended by then go on elsewhere, where they can."""
    hand_over_offline_us: int = 0
    drain_us: int = 120_000_000
    """A server that is not empty by then stays what it is."""
    switch_us: int = 120_000_000
    """A switch that is not over by then is told of; its server stays out of rotation."""


@dataclass(slots=True)
class _Move:
    """One server's."""

    wanted: SwitchWanted
    began_us: int
    recalled: set[Kind]
    asked_us: int | None = None
    """When it was empty, and the switch was asked for."""
    is_told: bool = False


class Switching:
    """Looked at in every call of the core while there is a move, which is at every poll at least.

    Of a role there is always a server in rotation that is not on the move: the last one is never
    taken, and where the others fail meanwhile, the one that drains comes back.
    """

    def __init__(
        self,
        fleet: Fleet,
        rule: SwitchRule,
        recall: Callable[[Recall, int], None],
        changed: Callable[[], None],
        say: Callable[[Decision], None],
    ) -> None:
        self._fleet = fleet
        self._recall = recall
        self._changed = changed
        self._say = say
        self.moves: dict[str, _Move] = {}
        self.rule = rule

    def begin(self, wanted: SwitchWanted, now_us: int) -> None:
        ledger = self._fleet.ledgers.get(wanted.worker)
        refusal = self._refusal(wanted, ledger)
        if ledger is None or refusal is not None:
            self._say(SwitchOver(wanted.worker, wanted.role, refusal or Outcome.UNKNOWN, 0))
            return
        ledger.switching = True
        self.moves[wanted.worker] = _Move(wanted, now_us, set())
        self._changed()

    def _refusal(self, wanted: SwitchWanted, ledger: Ledger | None) -> Outcome | None:
        if ledger is None or not ledger.up:
            return Outcome.UNKNOWN
        if wanted.worker in self.moves:
            return Outcome.MOVING
        if ledger.worker.role is wanted.role:
            return Outcome.SAME
        if Role.UNIFIED in (ledger.worker.role, wanted.role) and wanted.role is not None:
            return Outcome.UNIFIED
        return None if self._has_others(ledger) else Outcome.LAST

    def _has_others(self, ledger: Ledger) -> bool:
        """Whether the work of its role can go elsewhere."""
        mine = ledger.worker
        return any(
            other.up
            and not other.is_leaving
            and other.breaker.is_closed
            and other.worker.role is mine.role
            and (not other.worker.model or not mine.model or other.worker.model == mine.model)
            for name, other in self._fleet.ledgers.items()
            if name != mine.name
        )

    def advance(self, tickets: Iterable[Ticket], now_us: int) -> None:
        for name, move in list(self.moves.items()):
            ledger = self._fleet.ledgers.get(name)
            if ledger is None:
                leaves = move.wanted.role is None and move.asked_us is not None
                self._over(move, Outcome.DONE if leaves else Outcome.GONE, now_us)
                continue
            ledger.switching = True  # even if it was taken off the list and put back at once
            if move.asked_us is not None:
                self._await(move, move.asked_us, now_us)
            elif not self._has_others(ledger):
                self._back(move, ledger, Outcome.LAST, now_us)
            elif now_us - move.began_us > self.rule.drain_us:
                self._back(move, ledger, Outcome.BUSY, now_us)
            else:
                self._drain(move, ledger, tickets, now_us)

    def _back(self, move: _Move, ledger: Ledger, outcome: Outcome, now_us: int) -> None:
        ledger.switching = False
        self._over(move, outcome, now_us)
        self._changed()

    def _drain(self, move: _Move, ledger: Ledger, tickets: Iterable[Ticket], now_us: int) -> None:
        """Offline work gives way at once, online work when it takes too long."""
        limits = {
            Kind.OFFLINE: self.rule.hand_over_offline_us,
            Kind.ONLINE: self.rule.hand_over_us,
        }
        kinds = {kind for kind, most_us in limits.items() if now_us - move.began_us >= most_us}
        if kinds - move.recalled:
            for ticket in list(tickets):
                if ledger in (ticket.prefill, ticket.decode) and (
                    ticket.job.kind in kinds - move.recalled
                ):
                    self._recall(Recall(ticket.job.id, Reason.ROLE_SWITCH), now_us)
            move.recalled |= kinds
        if ledger.is_empty:
            move.asked_us = now_us
            wanted = move.wanted
            if wanted.role is None:
                self._say(Release(wanted.worker, wanted.why))
            else:
                self._say(SwitchRole(wanted.worker, wanted.role, wanted.why))

    def _await(self, move: _Move, asked_us: int, now_us: int) -> None:
        """It may still come: until it does, nobody is sent there."""
        if not move.is_told and now_us - asked_us > self.rule.switch_us:
            move.is_told = True
            self._tell(move, Outcome.HANGS, now_us)

    def ended(self, event: RoleSwitched, now_us: int) -> None:
        """The server is what it says it is, whatever was wanted; a silent one is down."""
        if (ledger := self._fleet.ledgers.get(event.worker)) is not None:
            if event.role is None:
                self._fleet.silence(event.worker)
            else:
                drains = ledger.draining
                self._fleet.add(replace(ledger.worker, role=event.role))
                ledger.draining = drains  # an operator's word outlasts the switch
            ledger.switching = False
        self._changed()
        if (move := self.moves.get(event.worker)) is None:
            return
        if event.role is None:
            self._over(move, Outcome.LOST, now_us, event.why)
        elif event.by_another:
            self._over(move, Outcome.TAKEN, now_us, event.why)
        elif event.role is move.wanted.role:
            self._over(move, Outcome.DONE, now_us)
        else:
            self._over(move, Outcome.FAILED, now_us, event.why)

    def _over(self, move: _Move, outcome: Outcome, now_us: int, why: str = "") -> None:
        del self.moves[move.wanted.worker]
        self._tell(move, outcome, now_us, why)

    def _tell(self, move: _Move, outcome: Outcome, now_us: int, why: str = "") -> None:
        wanted, asked_us = move.wanted, move.asked_us
        drained_us = (now_us if asked_us is None else asked_us) - move.began_us
        took_us = now_us - move.began_us
        self._say(SwitchOver(wanted.worker, wanted.role, outcome, drained_us, took_us, why))
