"""What preemption has cost so far, by class, server and reason."""

from __future__ import annotations

from collections import Counter

from gateway.books import Ticket
from policies.events import Preempted, Reason
from policies.ledger import Ledger
from policies.types import Kind


class Accounts:
    """Numbers that only grow."""

    __slots__ = ("lost_tokens", "preemptions", "recomputed_tokens")

    def __init__(self) -> None:
        self.preemptions: Counter[tuple[Kind, str, Reason]] = Counter()
        self.lost_tokens: Counter[Kind] = Counter()
        """Generated, and to be generated again."""
        self.recomputed_tokens: Counter[Kind] = Counter()
        """Of prompts, to be computed again unless a prefix cache still holds them."""

    def took(self, ticket: Ticket, ledger: Ledger | None, reason: Reason) -> str:
        """The name of the server whose room was wanted: its decode server if nobody says so."""
        wanted = ledger or ticket.decode
        worker = "" if wanted is None else wanted.worker.name
        self.preemptions[ticket.job.kind, worker, reason] += 1
        return worker

    def returned(self, ticket: Ticket, event: Preempted) -> None:
        """While its books still say what it had been given."""
        kind = ticket.job.kind
        self.lost_tokens[kind] += event.lost
        if ticket.prefill is None:
            self.recomputed_tokens[kind] += ticket.job.prompt_tokens + event.generated
