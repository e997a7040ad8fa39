"""Which servers are asked to change, so that there are as many of each role as a plan has."""

from __future__ import annotations

import math
from collections.abc import Callable

from backends.base import Post, Size
from gateway.core import Core
from policies.demand import Fleet
from policies.events import SwitchWanted
from policies.ledger import Ledger
from policies.ratio import Plan
from policies.types import Role


class RoleChanges:
    """Asks the core to move servers, and whoever can to start some."""

    def __init__(
        self,
        core: Core,
        post: Post,
        *,
        size: Size | None = None,
        at_once: int | None = None,
        comes_last: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """No more than `at_once` servers are asked to change while others do. A server of which
        `comes_last` is true is only taken where there is no other one."""
        self._core = core
        self._post = post
        self._at_once = math.inf if at_once is None else at_once
        self._comes_last = comes_last
        self.size = size

    def serving(self, role: Role) -> list[Ledger]:
        ledgers = self._core.ledgers
        return [
            ledger
            for name in sorted(ledgers)
            if (ledger := ledgers[name]).worker.role is role and ledger.up and not ledger.is_leaving
        ]

    def ask(self, plan: Plan, fleet: Fleet) -> int:
        """How many servers are asked to change, started ones included."""
        began = 0
        more = {
            Role.PREFILL: plan.prefills - fleet.prefills,
            Role.DECODE: plan.decodes - fleet.decodes,
        }
        hands = self._at_once - max(fleet.moving, len(self._core.switching.moves))
        asked: set[str] = set()
        for short, spare in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            while more[short] > 0 > more[spare]:
                more[short] -= 1
                more[spare] += 1
                began += len(asked) < hands and self._want(spare, short, plan, asked)
        for role, count in more.items():
            for _ in range(max(0, count)):
                if self.size is not None and fleet.is_elastic:
                    began += self.size.launch(role)
            for _ in range(max(0, -count)):
                if fleet.is_elastic:
                    began += len(asked) < hands and self._want(role, None, plan, asked)
        return began

    def _want(self, role: Role, to: Role | None, plan: Plan, asked: set[str]) -> bool:
        """The server with the least to end first; in a tie the last by name."""
        free = [it for it in self.serving(role) if it.worker.name not in asked]
        if len(free) < 2:
            return False
        chosen = min(reversed(free), key=self._cost)
        asked.add(chosen.worker.name)
        self._post(SwitchWanted(chosen.worker.name, to, plan.why.value))
        return True

    def _cost(self, ledger: Ledger) -> tuple[bool, int, int]:
        comes_last = self._comes_last(ledger.worker.name)
        return comes_last, ledger.decodes + ledger.prefills, ledger.context_tokens
