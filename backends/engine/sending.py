"""The prefill side of a pair: wait for the decode side's memory, compute, send, then answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from backends.engine.fabric import Fabric
from backends.engine.fuse import Fuse
from backends.engine.machine import Machine
from backends.engine.prefilling import Chunk, Prefilling
from backends.engine.request import Peer, Resident, Stage, length_reached
from policies.clock import Timer

BOOTSTRAP_FAILED = "Prefill bootstrap"
TRANSFER_FAILED = "Prefill transfer"


class Sending:
    """Rooms of one prefill server and the link that carries their KV away."""

    def __init__(
        self, machine: Machine, prefilling: Prefilling, fabric: Fabric, wake: Callable[[], None]
    ) -> None:
        self._machine = machine
        self._prefilling = prefilling
        self._fabric = fabric
        self._wake = wake
        self._rooms: dict[int, Resident] = {}
        self._offers: dict[int, Peer] = {}
        self._timers: dict[int, Timer] = {}
        self._link_free_s = 0.0
        self.sending: dict[int, Resident] = {}
        config = machine.config
        self._fuse = Fuse(
            machine.clock,
            config.bootstrap_timeout_s,
            still=lambda it: it.stage == Stage.BOOTSTRAP,
            blow=self._time_out,
        )

    @property
    def bootstrapping(self) -> int:
        return sum(it.stage == Stage.BOOTSTRAP for it in self._rooms.values())

    def clear(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._rooms.clear()
        self._offers.clear()
        self.sending.clear()
        self._fuse.clear()
        self._link_free_s = 0.0

    def arrive(self, resident: Resident) -> None:
        room = resident.request.bootstrap_room or 0
        if self._machine.is_fake(resident):
            self._prefilling.enqueue(resident)
        elif room in self._rooms:
            self._machine.fail(resident, BOOTSTRAP_FAILED, f"room {room} is in use")
        else:
            self._rooms[room] = resident
            resident.stage = Stage.BOOTSTRAP
            resident.peer = self._offers.pop(room, None)
            self._begin_or_wait(resident)

    def offered(self, room: int, peer: Peer) -> None:
        resident = self._rooms.get(room)
        if resident is None or resident.stage != Stage.BOOTSTRAP:
            self._offers[room] = peer
            return
        resident.peer = peer
        self._begin_or_wait(resident)

    def withdrawn(self, room: int, why: str) -> None:
        """A prompt that is being computed is computed to its end: only then is it polled again."""
        self._offers.pop(room, None)
        resident = self._rooms.get(room)
        if resident is None:
            return
        resident.failure = why
        if resident.stage == Stage.BOOTSTRAP:
            self.fail(resident, BOOTSTRAP_FAILED, why)
        elif resident.stage == Stage.SENDING:
            self.fail(resident, TRANSFER_FAILED, why)

    def computing(self, chunks: Iterable[Chunk]) -> None:
        """What the radix cache already held goes out while the rest is computed."""
        for chunk in chunks:
            resident = chunk.resident
            if chunk.cached_tokens and chunk.cached_tokens == resident.cached_tokens:
                self._put_on_link(resident, chunk.cached_tokens)

    def computed(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self._put_on_link(chunk.resident, chunk.new_tokens)

    def complete(self, resident: Resident) -> None:
        """The first token is sampled; the answer waits for the transfer."""
        resident.generated_before = 1
        if self._machine.is_fake(resident):
            self._machine.end(resident, length_reached(0), keep=False)
            return
        if resident.failure is not None:
            self.fail(resident, TRANSFER_FAILED, resident.failure)
            return
        resident.stage = Stage.SENDING
        self.sending[resident.serial] = resident
        clock, config = self._machine.clock, self._machine.config
        arrival = max(clock.time(), self._link_free_s) + config.link_latency_s
        self._timers[resident.serial] = clock.call_at(arrival, self._sent, resident)

    def fail(self, resident: Resident, what: str, why: str) -> None:
        self.drop(resident)
        self._machine.fail(resident, what, why)
        self._wake()

    def drop(self, resident: Resident) -> None:
        """Forget the room; the decode side is not told."""
        room = resident.request.bootstrap_room or 0
        if self._rooms.get(room) is resident:
            del self._rooms[room]
        self.sending.pop(resident.serial, None)
        timer = self._timers.pop(resident.serial, None)
        if timer is not None:
            timer.cancel()

    def _begin_or_wait(self, resident: Resident) -> None:
        if resident.peer is None:
            self._fuse.light(resident)
        else:
            self._prefilling.enqueue(resident)
            self._wake()

    def _time_out(self, resident: Resident) -> None:
        after_s = self._machine.config.bootstrap_timeout_s
        room = resident.request.bootstrap_room
        why = f"Request {room} timed out after {after_s}s in KVPoll.Bootstrapping"
        self.fail(resident, BOOTSTRAP_FAILED, why)

    def _put_on_link(self, resident: Resident, tokens: int) -> None:
        if self._machine.is_fake(resident):
            return
        config = self._machine.config
        size = tokens * config.kv_bytes_per_token
        self._machine.counters.transferred_bytes += size
        start = max(self._machine.clock.time(), self._link_free_s)
        self._link_free_s = start + size / config.link_bytes_per_s

    def _sent(self, resident: Resident) -> None:
        self.drop(resident)
        peer = resident.peer
        taken = False
        if peer is not None and peer.resident is not None:
            decode = self._fabric.named(peer.server)
            taken = decode.life == peer.life and decode.kv_arrived(
                peer.resident, cached_tokens=resident.cached_tokens
            )
        if taken:
            self._machine.end(resident, length_reached(0))
        else:
            self._machine.fail(resident, TRANSFER_FAILED, "the decode instance is gone")
        self._wake()
