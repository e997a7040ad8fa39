"""Prompts at unified servers whose end nobody has seen: a whole answer shows no first token."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.books import Ticket
from policies.ledger import Ledger


class Unshown:
    """Kept in the order in which they were sent, so that only the oldest are looked at."""

    def __init__(self) -> None:
        self._tickets: dict[Ledger, dict[str, Ticket]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._tickets.values()))

    def sent(self, ticket: Ticket, ledger: Ledger) -> None:
        here = self._tickets.get(ledger)
        if here is None:
            # Servers come and go under new names for as long as the gateway runs.
            self._tickets = {e: them for e, them in self._tickets.items() if e.prefills}
            here = self._tickets[ledger] = {}
        here.pop(ticket.job.id, None)
        here[ticket.job.id] = ticket
        if len(here) > 64 + 2 * ledger.prefills:
            self._tickets[ledger] = {n: it for n, it in here.items() if it.prefill is ledger}

    def computed(self, ledger: Ledger, before_us: int) -> Iterator[Ticket]:
        """Those sent before then, each of them once."""
        here = self._tickets.get(ledger, {})
        while here:
            name, ticket = next(iter(here.items()))
            is_there = ticket.prefill is ledger
            if is_there and ticket.sent_us >= before_us:
                return
            del here[name]
            if is_there:
                yield ticket
