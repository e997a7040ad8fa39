"""Which servers a job goes to, among those that may take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol
from zlib import crc32

from policies.ledger import Ledger
from policies.prefixes import prefix_tokens
from policies.types import Job, Kind, Pool

Ledgers = Sequence[Ledger]
_OFFLINE, _STRICT = Kind.OFFLINE, Pool.STRICT
_LENT_US = 1e12
"""Offline work takes what strict servers lend only when no relaxed one has room."""


class Place(Protocol):
    """A rank for each server; the lowest wins, and in a tie the first of the list.

    All are ranked in one call: a call for each would cost more than what it computes.
    """

    @property
    def by_prefix(self) -> bool:
        """Whether it looks at how prompts begin; only then have jobs their keys."""
        ...

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]: ...

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastWork:
    """Fewest prompt tokens outstanding at prefill; the shortest predicted step at decode.

    A server whose hardware is known is predicted by its cost model. For the others the constants
    here are those of an 8B model on an H100 (step tables of AIConfigurator 0.12): between such
    servers only their proportions matter.
    """

    by_prefix: ClassVar[bool] = False

    step_fixed_us: float = 6_600.0
    step_per_sequence_us: float = 25.0
    step_per_token_us: float = 0.036

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]:
        if job.cached_on:
            return [ledger.prefill_tokens + ledger.uncached(job) for ledger in ledgers]
        return [ledger.prefill_tokens for ledger in ledgers]

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]:
        prompt_tokens, draw = float(job.prompt_tokens), self._draw
        lines = [ledger.line or draw(ledger) for ledger in ledgers]
        if job.kind is _OFFLINE:
            return [alone + per_token * prompt_tokens + lent for alone, per_token, lent in lines]
        return [alone + per_token * prompt_tokens for alone, per_token, _ in lines]

    def _draw(self, ledger: Ledger) -> tuple[float, float, float]:
        """Few books change between two decisions: what the others add up to is kept."""
        held_tokens = ledger.context_tokens + ledger.foreign_tokens
        if ledger.steps is not None:
            alone_us, token_us = ledger.steps.line(ledger.decodes + 1, held_tokens)
        else:
            token_us = self.step_per_token_us
            alone_us = self.step_fixed_us + self.step_per_sequence_us * (ledger.decodes + 1)
            alone_us += token_us * held_tokens
        lent_us = _LENT_US if ledger.worker.pool is _STRICT else 0.0
        ledger.line = line = (alone_us, token_us, lent_us)
        return line


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Each server in turn, blind to load: a baseline."""

    by_prefix: ClassVar[bool] = False

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]:
        return [ledger.dispatched for ledger in ledgers]

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]:
        return [ledger.dispatched for ledger in ledgers]


_LAST: Final = 1e9
"""More than any load: behind all that are ranked by theirs."""


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The less busy of two servers that are drawn for each job: a baseline.

    They are drawn by the job's id, so the same job draws the same two. Where neither may take it,
    any other does rather than that it waits.
    """

    by_prefix: ClassVar[bool] = False

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]:
        return self._ranks(f"prefill/{job.id}", ledgers)

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]:
        return self._ranks(f"decode/{job.id}", ledgers)

    @staticmethod
    def _ranks(draw: str, ledgers: Ledgers) -> list[float]:
        ranks = [_LAST + load for load in _loads(ledgers)]
        if count := len(ledgers):
            number = crc32(draw.encode())
            first = number % count
            # The second is one of the others.
            second = (first + 1 + number // count % max(1, count - 1)) % count
            for drawn in {first, second}:
                ranks[drawn] -= _LAST
        return ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAware:
    """Prompts that begin alike go to one server, as SGLang's router has it: a baseline.

    While loads are even, a prompt goes where most of it is believed to be cached, if that is more
    than a share of it; otherwise where the least is. Loads are jobs at the server. Decode servers
    hold no prefixes: there the least busy one gets it.
    """

    by_prefix: ClassVar[bool] = True

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5

    def prefill(self, job: Job, ledgers: Ledgers) -> list[float]:
        loads = _loads(ledgers)
        if not loads or self._is_uneven(min(loads), max(loads)):
            return loads
        matched = [ledger.prefixes.matched(job.prefixes) for ledger in ledgers]
        most = max(matched)
        if prefix_tokens(most) > self.cache_threshold * job.prompt_tokens:
            return [_LAST * (most - own) + load for own, load in zip(matched, loads, strict=True)]
        return [float(len(ledger.prefixes)) for ledger in ledgers]

    def decode(self, job: Job, ledgers: Ledgers) -> list[float]:
        return _loads(ledgers)

    def _is_uneven(self, least: float, most: float) -> bool:
        return (
            most - least > self.balance_abs_threshold and most > self.balance_rel_threshold * least
        )


def _loads(ledgers: Ledgers) -> list[float]:
    return [float(ledger.prefills + ledger.decodes) for ledger in ledgers]
