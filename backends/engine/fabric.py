"""Where the servers of one fleet find each other: by bootstrap address, then by room."""

from __future__ import annotations

from typing import Protocol

from backends.addresses import canonical
from backends.engine.gpu import Gpu
from backends.engine.request import Peer, Resident
from policies.clock import Clock


class PrefillEnd(Protocol):
    """What a decode server may ask of a prefill server."""

    name: str
    life: int
    switches: int
    """How often it has changed its role in this life."""

    def serves_rooms(self) -> bool: ...

    def room_offered(self, room: int, peer: Peer) -> None:
        """The decode server has reserved memory and waits for the KV of this room."""
        ...

    def room_withdrawn(self, room: int, why: str) -> None:
        """The decode server gave the room up."""
        ...


class DecodeEnd(Protocol):
    """What a prefill server may ask of a decode server."""

    name: str
    life: int

    def kv_arrived(self, resident: Resident, *, cached_tokens: int) -> bool:
        """Whether anybody was there to take it."""
        ...

    def peer_lost(self, server: str, life: int, address: str) -> None: ...


class Server(PrefillEnd, DecodeEnd, Protocol):
    pass


class Fabric:
    """The network between the servers of one process, and the GPUs under them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._servers: dict[str, Server] = {}
        self._addresses: dict[tuple[str, int], str] = {}
        self._gpus: dict[str, Gpu] = {}

    def join(self, server: Server, host: str, port: int) -> None:
        if server.name in self._servers:
            raise ValueError(f"two servers are called {server.name}")
        if (canonical(host), port) in self._addresses:
            raise ValueError(f"two servers claim the bootstrap address {host}:{port}")
        self._servers[server.name] = server
        self._addresses[canonical(host), port] = server.name

    def gpu(self, host: str) -> Gpu:
        """Shared by the servers that name the same host; one that names none has its own."""
        gpu = self._gpus.setdefault(host, Gpu()) if host else Gpu()
        gpu.join()
        return gpu

    def prefill_at(self, host: str, port: int) -> Server | None:
        name = self._addresses.get((canonical(host), port))
        server = self._servers[name] if name is not None else None
        return server if server is not None and server.serves_rooms() else None

    def named(self, name: str) -> Server:
        return self._servers[name]

    def died(self, server: Server, address: str, notice_s: float) -> None:
        """Decode servers find out by heartbeat, if it is still dead by then."""
        life = server.life

        def notice() -> None:
            if not server.serves_rooms():
                for other in self._servers.values():
                    other.peer_lost(server.name, life, address)

        self._clock.call_at(self._clock.time() + notice_s, notice)
