"""Whether somebody else changes roles: servers say that they are what nobody here made them."""

from __future__ import annotations

from gateway.core import Core
from policies.events import Event, LoadReport, RoleSwitched, WorkerGone, WorkerUp
from policies.types import Role, Worker


class OtherHands:
    """Told of every event, before the core hears of it."""

    def __init__(self, core: Core, lease_s: float) -> None:
        self._core = core
        self.lease_s = lease_s
        """For so long after a change of theirs nothing is changed here."""
        self.until_us = 0
        """When the last change of theirs is as old as that."""
        self._roles: dict[str, Role] = {}
        """As the servers said last, or as they were made here. What a server says first is not a
        change, whatever it is configured as."""
        self._announced: dict[str, Role] = {}
        """As whoever asked them said last: the core may hear of it only after us."""

    def hear(self, now_us: int, event: Event) -> None:
        match event:
            case RoleSwitched(name, Role() as role, _, by_another):
                if by_another:
                    self._seen(now_us)
                self._roles[name] = self._announced[name] = role
            case WorkerUp(worker):
                self._announce(worker)
            case WorkerGone(name):
                self._forget(name)  # it may come back as something else
            case LoadReport(name):
                self._watch(name, now_us)
            case _:
                pass

    def _announce(self, worker: Worker) -> None:
        known = self._core.ledgers.get(worker.name)
        if known is None or known.worker.url != worker.url:
            self._forget(worker.name)
        self._announced[worker.name] = worker.role

    def _forget(self, name: str) -> None:
        self._roles.pop(name, None)
        self._announced.pop(name, None)

    def _watch(self, name: str, now_us: int) -> None:
        """A role that changed while nothing moved here was changed by somebody else."""
        if (ledger := self._core.ledgers.get(name)) is None:
            return
        role = self._announced.get(name, ledger.worker.role)
        was = self._roles.setdefault(name, role)
        if role is not was:
            self._roles[name] = role
            if name not in self._core.switching.moves:
                self._seen(now_us)

    def _seen(self, now_us: int) -> None:
        self.until_us = now_us + round(self.lease_s * 1e6)
