"""The decode side of a pair: find the prefill server, reserve memory, receive, then run."""

from __future__ import annotations

from collections.abc import Callable

from backends.engine.fabric import Fabric, Server
from backends.engine.fuse import Fuse
from backends.engine.machine import Machine
from backends.engine.prefilling import urgency
from backends.engine.request import Peer, Resident, Stage, aborted
from policies.clock import Timer

Met = tuple[str, int, int]
"""A prefill server, its life, and how often it had changed its role in it."""
HANDSHAKE_FAILED = "Decode handshake"
TRANSFER_FAILED = "Decode transfer"
NO_BACKUP = "Retracted under decode memory pressure without a KV backup. Retry later."


class Receiving:
    """Requests of a decode server before they run, and those that had to step back."""

    def __init__(
        self,
        machine: Machine,
        fabric: Fabric,
        *,
        myself: Callable[[Resident], Peer],
        wake: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._fabric = fabric
        self._myself = myself
        self._wake = wake
        self._retry: Timer | None = None
        self._connected: dict[str, Met] = {}
        """What answered at each bootstrap address, as it was spelled, when it was connected to."""
        self.handshaking: dict[int, tuple[float, Resident]] = {}
        self.prealloc: dict[int, Resident] = {}
        self.receiving: dict[int, Resident] = {}
        self.ready: dict[int, Resident] = {}
        self.retracted: dict[int, Resident] = {}
        self._fuse = Fuse(
            machine.clock,
            machine.config.waiting_timeout_s,
            still=lambda it: it.stage == Stage.RECEIVING,
            blow=self._time_out,
        )

    def clear(self) -> None:
        for queue in (self.prealloc, self.receiving, self.ready, self.retracted):
            queue.clear()
        self.handshaking.clear()
        self._fuse.clear()
        if self._retry is not None:
            self._retry.cancel()
        self._retry = None

    def forget_peers(self) -> None:
        self._connected.clear()

    def arrive(self, resident: Resident) -> None:
        if self._machine.is_fake(resident) or self._prefill(resident) is not None:
            resident.stage = Stage.PREALLOC
            self.prealloc[resident.serial] = resident
            return
        resident.stage = Stage.HANDSHAKE
        until = self._machine.clock.time() + self._machine.config.handshake_s
        self.handshaking[resident.serial] = (until, resident)
        self._arm_retry()

    def advance(self) -> None:
        """Retracted requests come back before anything new is taken in."""
        self._resume_retracted()
        if not self.retracted:
            self._reserve()
        self._run_ready()

    def retract(self, resident: Resident) -> None:
        if not self._machine.config.retraction_backup:
            self._machine.end(resident, aborted(NO_BACKUP, 503))
            return
        resident.stage = Stage.RETRACTED
        self.retracted[resident.serial] = resident

    def arrived(self, resident: Resident, cached_tokens: int) -> bool:
        if self.receiving.pop(resident.serial, None) is None:
            return False
        resident.cached_tokens = cached_tokens
        self._make_ready(resident)
        self._wake()
        return True

    def lost(self, server: str, life: int, address: str) -> None:
        why = f"Lost connection with prefill instance (bootstrap_addr: {address})"
        self._connected = {at: met for at, met in self._connected.items() if met[0] != server}
        for resident in list(self.receiving.values()):
            if resident.peer is not None and (resident.peer.server, resident.peer.life) == (
                server,
                life,
            ):
                del self.receiving[resident.serial]
                self._machine.fail(resident, TRANSFER_FAILED, why)
        self._wake()

    def give_up(self, resident: Resident, why: str) -> None:
        """End a request that does not run yet, and tell the prefill server."""
        before_transfer = resident.stage in {Stage.HANDSHAKE, Stage.PREALLOC}
        self.drop(resident)
        prefill = None if self._machine.is_fake(resident) else self._prefill(resident)
        room = resident.request.bootstrap_room or 0
        self._machine.fail(resident, HANDSHAKE_FAILED if before_transfer else TRANSFER_FAILED, why)
        if prefill is not None and not self._is_stale(resident, prefill):
            prefill.room_withdrawn(room, why)

    def drop(self, resident: Resident) -> None:
        for queue in (self.prealloc, self.receiving, self.ready, self.retracted):
            queue.pop(resident.serial, None)
        self.handshaking.pop(resident.serial, None)

    def _prefill(self, resident: Resident) -> Server | None:
        port = resident.request.bootstrap_port
        return self._fabric.prefill_at(
            resident.request.bootstrap_host,
            self._machine.config.bootstrap_port if port is None else port,
        )

    def _arm_retry(self) -> None:
        if self._retry is None and self.handshaking:
            clock = self._machine.clock
            when = clock.time() + self._machine.config.handshake_retry_s
            self._retry = clock.call_at(when, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        now = self._machine.clock.time()
        for until, resident in list(self.handshaking.values()):
            if self._prefill(resident) is not None:
                del self.handshaking[resident.serial]
                resident.stage = Stage.PREALLOC
                self.prealloc[resident.serial] = resident
            elif now >= until:
                self.give_up(resident, "Aborted by AbortReq.")
        self._arm_retry()
        self._wake()

    def _resume_retracted(self) -> None:
        machine = self._machine
        for resident in list(self.retracted.values()):
            kv_tokens = machine.kv.pages(resident.fill_tokens - 1)
            spare = machine.config.reserved_decode_tokens if len(machine.batch) else 0
            if len(machine.batch) >= machine.config.max_running:
                return
            if kv_tokens + spare > machine.kv.available or not machine.kv.take(kv_tokens):
                return
            del self.retracted[resident.serial]
            resident.held, resident.prefilled = kv_tokens, resident.fill_tokens - 1
            machine.batch.join(resident)

    def _reserve(self) -> None:
        """Take memory for new requests in order; the prefill side computes only after this."""
        machine = self._machine
        queue = list(self.prealloc.values())
        if machine.config.priority:
            queue.sort(key=urgency)
        for resident in queue:
            holders = len(machine.batch) + len(self.receiving) + len(self.ready)
            if holders >= machine.config.slots:
                return
            need = machine.kv.pages(resident.request.prompt.tokens)
            spare = machine.config.reserved_decode_tokens * (holders + 1) if holders else 0
            if need + spare > machine.kv.available or not machine.kv.take(need):
                return
            resident.held = need
            del self.prealloc[resident.serial]
            self._announce(resident)

    def _announce(self, resident: Resident) -> None:
        if self._machine.is_fake(resident):
            self._make_ready(resident)
            return
        resident.stage = Stage.RECEIVING
        self.receiving[resident.serial] = resident
        self._fuse.light(resident)
        prefill = self._prefill(resident)
        if prefill is not None:
            resident.peer = Peer(prefill.name, prefill.life)
            self._connected.setdefault(self._address(resident), met(prefill))
            if not self._is_stale(resident, prefill):
                prefill.room_offered(resident.request.bootstrap_room or 0, self._myself(resident))

    def _is_stale(self, resident: Resident, prefill: Server) -> bool:
        """The connection leads to a life, or to a turn at its role, that is over: what is sent
        over it is lost. SGLang notices by missed heartbeats or when a request has timed out."""
        known = self._connected.get(self._address(resident))
        return known is not None and known != met(prefill)

    def _address(self, resident: Resident) -> str:
        request, port = resident.request, resident.request.bootstrap_port
        return f"{request.bootstrap_host}:{port or self._machine.config.bootstrap_port}"

    def _make_ready(self, resident: Resident) -> None:
        resident.stage = Stage.READY
        resident.prefilled = resident.request.prompt.tokens
        self.ready[resident.serial] = resident

    def _run_ready(self) -> None:
        """The first token came with the KV; it is told when the request enters the batch."""
        machine = self._machine
        for resident in list(self.ready.values()):
            if len(machine.batch) >= machine.config.max_running:
                return
            del self.ready[resident.serial]
            resident.generated_before = 1
            resident.settle_end()
            machine.heard_first(resident)
            if resident.limit <= 1:
                machine.end(resident, resident.natural_end)
            else:
                machine.batch.join(resident)

    def _time_out(self, resident: Resident) -> None:
        after_s = self._machine.config.waiting_timeout_s
        room = resident.request.bootstrap_room
        self.give_up(
            resident, f"Request {room} timed out after {after_s}s in KVPoll.WaitingForInput"
        )
        self._connected.pop(self._address(resident), None)
        self._wake()


def met(prefill: Server) -> Met:
    return (prefill.name, prefill.life, prefill.switches)
