"""Which long prompt makes way when the first of a queue finds no room."""

from __future__ import annotations

from gateway.books import Ticket
from gateway.lifecycle import State
from gateway.servers import Candidates
from policies.displace import UNKNOWN_CHUNK_TOKENS, Displace, Standing, standing_of
from policies.ledger import DISPLACES, Ledger
from policies.order import Order, Outlook
from policies.types import Job, Kind


class Underway:
    """The long prompts at the servers: each is alone at its own, by the rules of admission."""

    def __init__(self) -> None:
        self._tickets: dict[str, Ticket] = {}

    def sent(self, ticket: Ticket, ledger: Ledger, least_chunks: int) -> None:
        if ticket.job.kind is Kind.OFFLINE and DISPLACES in ledger.worker.engine:
            return  # the engine sees to it, and nothing is lost
        chunk_tokens = ledger.chunk_tokens or UNKNOWN_CHUNK_TOKENS
        if least_chunks and ticket.booked_prefill > least_chunks * chunk_tokens:
            if ledger.worker.name not in self._tickets:
                # Servers come and go under new names for as long as the gateway runs.
                known = self._tickets.items()
                self._tickets = {name: it for name, it in known if it.prefill is not None}
            self._tickets[ledger.worker.name] = ticket

    def victim(
        self, head: Job, candidates: Candidates, displace: Displace, order: Order, outlook: Outlook
    ) -> tuple[Ticket, Job] | None:
        """With its job as it will queue again: the one that keeps its server the longest.

        One at a time: whoever makes way already makes it for this head, too.
        """
        found: tuple[Ticket, Job] | None = None
        best_us = 0.0
        for ledger in candidates.prefills + candidates.unified:
            ticket = self._tickets.get(ledger.worker.name)
            if ticket is None:
                continue
            if ticket.prefill is not ledger:
                del self._tickets[ledger.worker.name]
            elif ticket.state is State.YIELDING:
                return None
            elif (standing := self._standing(ticket, ledger, outlook)) is not None:
                saved_us = standing.rest_us - standing.lost_us
                if saved_us > best_us and displace.makes_way(standing, head, order, outlook):
                    found, best_us = (ticket, standing.job), saved_us
        return found

    @staticmethod
    def _standing(ticket: Ticket, ledger: Ledger, outlook: Outlook) -> Standing | None:
        if not ticket.may_yield:
            return None
        return standing_of(ticket.job, ledger, ticket.sent_us, ticket.displaced, outlook.now_us)
