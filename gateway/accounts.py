"""What preemption has cost so far, by class, server and reason."""

from __future__ import annotations

from collections import Counter

from gateway.books import Ticket
from policies.events import Preempted, Reason
from policies.ledger import Ledger
from policies.types import Kind


class Accounts:
    """Numbers that only grow."""

    __slots__ = ("lost_tokens", "preemptions", "resent_tokens")

    def __init__(self) -> None:
        self.preemptions: Counter[tuple[Kind, str, Reason]] = Counter()
        self.lost_tokens: Counter[Kind] = Counter()
        """Generated, and to be generated again."""
        self.resent_tokens: Counter[Kind] = Counter()
        """Of prompts and of what is kept, to be sent again; a prefix cache may still hold them."""

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
        self.resent_tokens[kind] += ticket.sent_job.prompt_tokens + event.generated
