"""Which servers a kind of job may use at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

from policies.types import Kind, Pool, Role, Worker


class Pools(Protocol):
    @property
    def lends(self) -> bool:
        """Whether strict decode servers take offline work as far as their slack goes."""
        ...

    def servers(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        """Those that it uses before anything is lent to it, in their order."""
        ...

    def lent(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        """The decode servers of the other pool that it may use besides."""
        ...

    def shares(self, kind: Kind) -> bool:
        """Whether it may use any server while nobody of its pool is in rotation."""
        ...

    def holds(self, kind: Kind) -> bool:
        """Whether it waits meanwhile, whatever other servers could lend it."""
        ...

    def refuses(self, kind: Kind) -> bool:
        """Whether it is refused meanwhile: neither what runs nor what is lent makes it wait."""
        ...


@dataclass(frozen=True, slots=True)
class Shared:
    """One pool: every server takes every job of its role."""

    lends: ClassVar[bool] = False

    def servers(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        return list(workers)

    def lent(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        return []

    def shares(self, kind: Kind) -> bool:
        return True

    def holds(self, kind: Kind) -> bool:
        return False

    def refuses(self, kind: Kind) -> bool:
        return False


class WithoutRelaxed(StrEnum):
    """What becomes of offline work where no relaxed server is in rotation."""

    SHARE = "share"
    HOLD = "hold"
    REJECT = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLatency:
    """Online work decodes on strict servers, offline work on relaxed ones and on what strict ones
    lend.

    A pool is its unified servers and, beside a prefill server, its decode servers: one of either
    is enough to keep a kind off the other pool. Prefill servers are everybody's. A kind whose pool
    can serve nothing shares what there is: holding it back would hang it. Offline work can be kept
    from that.
    """

    lends: bool = False
    """Whether strict decode servers take offline work as far as their slack goes."""
    without_relaxed: WithoutRelaxed = WithoutRelaxed.SHARE

    def servers(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        if own := _own(kind, workers):
            return own
        return list(workers) if self.shares(kind) else []

    def lent(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        if kind is Kind.ONLINE or not self.lends or not _own(kind, workers):
            return []
        return [w for w in workers if w.role is Role.DECODE and w.pool is Pool.STRICT]

    def shares(self, kind: Kind) -> bool:
        """Whether it may use the other pool while nobody of its own is in rotation."""
        return kind is Kind.ONLINE or self.without_relaxed is WithoutRelaxed.SHARE

    def holds(self, kind: Kind) -> bool:
        return kind is Kind.OFFLINE and self.without_relaxed is WithoutRelaxed.HOLD

    def refuses(self, kind: Kind) -> bool:
        return kind is Kind.OFFLINE and self.without_relaxed is WithoutRelaxed.REJECT


def _own(kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
    """Its pool with the prefill servers; nobody, if these could not serve anything."""
    wanted = Pool.STRICT if kind is Kind.ONLINE else Pool.RELAXED
    own = [w for w in workers if w.role is Role.PREFILL or w.pool is wanted]
    roles = {w.role for w in own}
    return own if Role.UNIFIED in roles or {Role.PREFILL, Role.DECODE} <= roles else []
