"""Which servers a kind of job may use at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.types import Kind, Pool, Role, Worker


class Pools(Protocol):
    def prefills(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        """Servers that may compute the prompt: prefill servers, and unified ones for all of it."""
        ...

    def decodes(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]: ...


@dataclass(frozen=True, slots=True)
class Shared:
    """One pool: every server takes every job of its role."""

    def prefills(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        return [w for w in workers if w.role is not Role.DECODE]

    def decodes(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        return [w for w in workers if w.role is Role.DECODE]


@dataclass(frozen=True, slots=True)
class ByLatency:
    """Online work decodes on strict servers and offline work on relaxed ones.

    A kind whose pool is empty shares what there is: holding it back would hang it.
    """

    def prefills(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        unified = self._own(kind, [w for w in workers if w.role is Role.UNIFIED])
        return [w for w in workers if w.role is Role.PREFILL] + unified

    def decodes(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        return self._own(kind, [w for w in workers if w.role is Role.DECODE])

    def _own(self, kind: Kind, workers: list[Worker]) -> list[Worker]:
        wanted = Pool.STRICT if kind is Kind.ONLINE else Pool.RELAXED
        return [w for w in workers if w.pool is wanted] or workers
