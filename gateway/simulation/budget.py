"""A budget for the latency of a step: online requests take of it first, offline ones what is left.

This is HyGen's rule (arXiv 2501.14808) as far as somebody before the servers can keep it. Inside an
engine each batch is filled up to the budget; from outside only whole requests can be let in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from gateway.settings import bounded
from policies.types import Job, Kind

LOOK_S = 0.05
"""How often the door looks again while offline requests wait before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEntry:
    """The budget, and a predictor that is linear in counts of requests and tokens."""

    ms: float = bounded(20.0, low=0.001)
    """The longest step that may be expected once an offline request has joined it."""
    step_ms: float = bounded(7.0, low=0)
    sequence_us: float = bounded(50.0, low=0)
    context_token_us: float = bounded(0.05, low=0)
    prompt_token_us: float = bounded(25.0, low=0)
    """0: other servers compute the prompts, and no decode step waits for one."""

    def step_s(self, sequences: float, context_tokens: float) -> float:
        """Of a decode step."""
        counted_us = sequences * self.sequence_us + context_tokens * self.context_token_us
        return self.step_ms / 1e3 + counted_us / 1e6

    def prompt_s(self, job: Job) -> float:
        """For so long decode steps wait, where one server does both."""
        return job.prompt_tokens * self.prompt_token_us / 1e6


class Budgeted(Protocol):
    """What this door sees and does; a part of what the others see, and some of its own."""

    @property
    def budget(self) -> BudgetEntry: ...

    @property
    def decoding_servers(self) -> int: ...

    @property
    def context_tokens(self) -> int:
        """Of all that decodes, as it was last reported."""
        ...

    @property
    def now_s(self) -> float: ...

    def enter(self, job: Job) -> None: ...

    def call_in(self, seconds: float, callback: Callable[..., object], *given: object) -> None: ...


@dataclass(slots=True)
class LatencyBudget:
    """Offline requests enter in the order they came, while the step with them fits the budget.

    A prompt cannot be cut over steps from outside. So what the budget leaves beside the steps is
    saved up: a prompt is a debt, of online requests too, and the next offline one waits until it is
    paid. While no online request is inside nobody minds a debt, and it is forgotten.
    """

    hall: Budgeted
    inside: dict[str, Job] = field(default_factory=dict)
    silent: dict[str, Job] = field(default_factory=dict)
    """Those that have no first token: no report has their prompts yet."""
    waiting: deque[Job] = field(default_factory=deque)
    online: int = 0
    debt_s: float = 0.0
    paid_to_s: float = 0.0
    looks: bool = False

    def arrived(self, job: Job) -> None:
        self._pay()
        if job.kind is Kind.ONLINE:
            self._let_in(job)
            return
        self.waiting.append(job)
        self._fill()
        if not self.looks:
            self.looks = True
            self.hall.call_in(LOOK_S, self._look)

    def first_token(self, job_id: str) -> None:
        self.silent.pop(job_id, None)

    def ended(self, job_id: str) -> None:
        self._pay()
        self.silent.pop(job_id, None)
        if (job := self.inside.pop(job_id, None)) is not None:
            self.online -= job.kind is Kind.ONLINE

    def _look(self) -> None:
        self._pay()
        self._fill()
        self.looks = bool(self.waiting)
        if self.looks:
            self.hall.call_in(LOOK_S, self._look)

    def _fill(self) -> None:
        budget_s = self.hall.budget.ms / 1e3
        while self.waiting and self.debt_s <= 0 and self._step_s(self.waiting[0]) <= budget_s:
            self._let_in(self.waiting.popleft())

    def _let_in(self, job: Job) -> None:
        self.inside[job.id] = self.silent[job.id] = job
        self.online += job.kind is Kind.ONLINE
        if self.online:
            self.debt_s += self.hall.budget.prompt_s(job)
        self.hall.enter(job)

    def _step_s(self, candidate: Job | None = None) -> float:
        """Of the mean server: they are filled evenly."""
        joining = [*self.silent.values(), *([candidate] if candidate is not None else [])]
        sequences = len(self.inside) + (candidate is not None)
        context = self.hall.context_tokens + sum(it.prompt_tokens for it in joining)
        servers = self.hall.decoding_servers
        return self.hall.budget.step_s(sequences / servers, context / servers)

    def _pay(self) -> None:
        """Each step leaves what the budget has beyond it; all servers pay together."""
        now_s = self.hall.now_s
        if not self.online:
            self.debt_s = 0.0
        elif self.debt_s > 0:
            left = max(0.0, 1 - self._step_s() * 1e3 / self.hall.budget.ms)
            self.debt_s -= (now_s - self.paid_to_s) * left * self.hall.decoding_servers
        self.paid_to_s = now_s
