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

    def prefills(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        """Servers that may compute the prompt: prefill servers, and unified ones for all of it."""
        ...

    def decodes(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]: ...

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

    def prefills(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        return [w for w in workers if w.role is not Role.DECODE]

    def decodes(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        return [w for w in workers if w.role is Role.DECODE]

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

    A kind whose pool is empty shares what there is: holding it back would hang it. Offline work
    can be kept from that.
    """

    lends: bool = False
    """Whether strict decode servers take offline work as far as their slack goes."""
    without_relaxed: WithoutRelaxed = WithoutRelaxed.SHARE

    def prefills(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        unified = self._own(kind, [w for w in workers if w.role is Role.UNIFIED])
        return [w for w in workers if w.role is Role.PREFILL] + unified

    def decodes(self, kind: Kind, workers: Sequence[Worker]) -> list[Worker]:
        decodes = [w for w in workers if w.role is Role.DECODE]
        own = self._own(kind, decodes)
        if kind is Kind.OFFLINE and self.lends and own:
            return decodes
        return own

    def shares(self, kind: Kind) -> bool:
        """Whether it may use the other pool while nobody of its own is in rotation."""
        return kind is Kind.ONLINE or self.without_relaxed is WithoutRelaxed.SHARE

    def holds(self, kind: Kind) -> bool:
        return kind is Kind.OFFLINE and self.without_relaxed is WithoutRelaxed.HOLD

    def refuses(self, kind: Kind) -> bool:
        return kind is Kind.OFFLINE and self.without_relaxed is WithoutRelaxed.REJECT

    def _own(self, kind: Kind, workers: list[Worker]) -> list[Worker]:
        wanted = Pool.STRICT if kind is Kind.ONLINE else Pool.RELAXED
        own = [w for w in workers if w.pool is wanted]
        return own or (workers if self.shares(kind) else [])
