"""What the parts of one scheduler share, and the one place where a request leaves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from backends.engine.batch import DecodeBatch
from backends.engine.config import EngineConfig
from backends.engine.kv import KvPool
from backends.engine.request import FAKE_BOOTSTRAP_HOST, Resident, Stage, aborted
from policies.clock import Clock
from policies.types import Role


@dataclass(slots=True)
class Counters:
    """Cumulative figures that /v1/loads and /metrics show."""

    prefill_uncached_tokens: int = 0
    prefill_cached_tokens: int = 0
    prefill_busy_us: int = 0
    decode_moments: list[float] = field(default_factory=lambda: [0.0] * 6)
    """n, sum b, sum t_us, sum b^2, sum b*t_us, tokens generated."""
    retractions: int = 0
    requests: int = 0
    aborts: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    bootstrap_failures: int = 0
    transfer_failures: int = 0
    transferred_bytes: int = 0
    tokens_per_s: float = 0.0
    """Of the last decode step."""

    def decoded(self, batch: int, step_us: float) -> None:
        self.tokens_per_s = batch / step_us * 1e6 if step_us else 0.0
        moments = self.decode_moments
        moments[0] += 1
        moments[1] += batch
        moments[2] += step_us
        moments[3] += batch * batch
        moments[4] += batch * step_us
        moments[5] += batch


class Machine:
    """Memory, running batch and the requests that are alive."""

    def __init__(self, config: EngineConfig, clock: Clock) -> None:
        self.config = config
        self.clock = clock
        self.counters = Counters()
        self.live: dict[str, Resident] = {}
        self.take_role(config.role)

    def take_role(self, role: Role) -> None:
        """Begin anew in a role: nothing cached, nothing running."""
        config = self.config
        self.role = role
        self.batch = DecodeBatch(config.page_tokens)
        self.kv = KvPool(
            capacity=config.kv_tokens, page=config.page_tokens, caching=role != Role.DECODE
        )

    def heard_first(self, resident: Resident) -> None:
        """A token that no decode step brought: the first one, or the first after a retraction."""
        fresh = resident.first_token_s is None
        if fresh:
            resident.first_token_s = self.clock.time()
            self.counters.generated_tokens += 1
        if fresh or resident.request.stream:
            resident.listener.tokens(resident)

    def share(self, resident: Resident) -> None:
        """Hand finished whole pages to the prefix cache and keep them locked."""
        kv = self.kv
        whole = kv.whole(resident.prefilled)
        if not kv.caching or whole <= resident.shared or self.is_fake(resident):
            return
        prompt = resident.full_prompt().cut(0, whole)
        node = kv.store(resident.request.space, prompt, whole - resident.shared)
        kv.cache.lock(node)
        if resident.node is not None:
            kv.cache.unlock(resident.node)
        resident.held -= whole - resident.shared
        resident.shared = whole
        resident.node = node

    def release(self, resident: Resident, *, keep: bool) -> None:
        """Free its memory; with `keep`, what it computed stays in the prefix cache."""
        if resident.batch is not None:
            self.batch.leave(resident)
        if keep:
            self.share(resident)
        self.kv.give(resident.held)
        if resident.node is not None:
            self.kv.cache.unlock(resident.node)
        resident.node, resident.held, resident.shared, resident.prefilled = None, 0, 0, 0

    def end(self, resident: Resident, reason: dict[str, Any], *, keep: bool = True) -> None:
        """The request is over; its listener hears so last."""
        self.release(resident, keep=keep)
        self.forget(resident)
        if reason["type"] == "abort":
            self.counters.aborts += 1
        resident.end_reason = reason
        resident.listener.finished(resident, reason)

    def fail(self, resident: Resident, what: str, why: str) -> None:
        """End one leg of a pair in SGLang's words."""
        message = (
            f"{what} failed for request rank=0 req.rid={resident.request.rid!r} "
            f"req.bootstrap_room={resident.request.bootstrap_room} with exception "
            f"KVTransferError(bootstrap_room={resident.request.bootstrap_room}): {why}"
        )
        if "transfer" in what:
            self.counters.transfer_failures += 1
        else:
            self.counters.bootstrap_failures += 1
        self.end(resident, aborted(message, 500))

    def forget(self, resident: Resident) -> None:
        resident.stage = Stage.DONE
        self.live.pop(resident.request.rid, None)

    @staticmethod
    def is_fake(resident: Resident) -> bool:
        return resident.request.bootstrap_host == FAKE_BOOTSTRAP_HOST
