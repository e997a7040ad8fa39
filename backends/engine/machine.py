"""What the parts of one scheduler share, and the one place where a request leaves it."""

from __future__ import annotations

from typing import Any

from backends.engine.batch import DecodeBatch
from backends.engine.config import EngineConfig
from backends.engine.counters import Counters
from backends.engine.kv import KvPool
from backends.engine.request import FAKE_BOOTSTRAP_HOST, Resident, Stage, aborted
from policies.clock import Clock
from policies.types import Role


class Machine:
    """Memory, running batch and the requests that are alive."""

    def __init__(
        self, config: EngineConfig, clock: Clock, batch: type[DecodeBatch] = DecodeBatch
    ) -> None:
        self.config = config
        self._new_batch = batch
        self.clock = clock
        self.counters = Counters()
        self.live: dict[str, Resident] = {}
        self.ended = 0
        """Requests that left; who plans sees by it whether memory came free meanwhile."""
        self.take_role(config.role)

    def take_role(self, role: Role) -> None:
        """Begin anew in a role: nothing cached, nothing running."""
        config = self.config
        self.role = role
        self.batch = self._new_batch(config.page_tokens)
        self.kv = KvPool(
            capacity=config.kv_tokens, page=config.page_tokens, caching=role != Role.DECODE
        )

    def heard_first(self, resident: Resident) -> None:
        """A token that no decode step brought: the first one, or the first after a retraction."""
        fresh = resident.first_token_s is None
        if fresh:
            resident.first_token_s = self.clock.time()
            self.counters.generated_tokens += 1
            self.counters.ttft.observe(resident.first_token_s - resident.arrived_s)
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

    def retract(self, resident: Resident) -> None:
        """A running request loses its memory, and nothing of it is cached."""
        self.release(resident, keep=False)
        resident.retractions += 1
        self.counters.retractions += 1

    def end(self, resident: Resident, reason: dict[str, Any], *, keep: bool = True) -> None:
        """The request is over; its listener hears so last."""
        self.release(resident, keep=keep)
        self.forget(resident)
        self.ended += 1
        if reason["type"] == "abort":
            self.counters.aborts += 1
        self.counters.e2e.observe(self.clock.time() - resident.arrived_s)
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
