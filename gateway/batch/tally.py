"""What the rows that ran here have come to: numbers that only grow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gateway.batch.objects import Result
from gateway.errors import Code


@dataclass(slots=True)
class Tally:
    completed: int = 0
    failed: int = 0
    fenced: int = 0
    """Results that were refused: the row was another's by then."""
    resumed: int = 0
    """Rows that went on from another run's tokens."""
    checkpoints: int = 0
    leases_lost: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    later: Counter[Code] = field(default_factory=Counter)
    """Tries that came to nothing, by why."""

    def finished(self, result: Result) -> None:
        if result.failed:
            self.failed += 1
        else:
            self.completed += 1
        self.prompt_tokens += result.prompt_tokens
        self.generated_tokens += result.generated_tokens

    def put_off(self, code: Code) -> None:
        self.later[code] += 1
