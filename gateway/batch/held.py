"""A row in this process: who runs it, and what of it could be kept now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from backends.checkpoint import Checkpoint
from gateway.batch.objects import Row
from gateway.visit import Visit


@dataclass(slots=True, eq=False)
class Held:
    row: Row
    request_id: str
    task: asyncio.Task[None] | None = None
    visit: Visit | None = None
    kept_tokens: int = 0
    """In the store's checkpoint."""

    @property
    def tokens(self) -> int:
        """Made so far, earlier processes included."""
        if self.visit is None:
            return 0
        return sum(max(p.exchange.tokens, p.exchange.kept_tokens) for p in self.visit.parts)

    def taken(self, fresh_tokens: int) -> Checkpoint | None:
        """What it has, where that is so much more than what is kept."""
        if self.visit is None or (taken := self.visit.checkpoint()) is None:
            return None
        return taken if taken.tokens >= self.kept_tokens + fresh_tokens else None


Mark = tuple[Held, Checkpoint]


def marks_of(rows: Iterable[Held], *, fresh_tokens: int) -> list[Mark]:
    return [(held, taken) for held in rows if (taken := held.taken(fresh_tokens))]
