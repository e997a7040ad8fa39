"""What tenants have on its way in at this gateway: it takes room before the database knows it."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.batch.faults import QuotaExceeded
from gateway.batch.objects import Quota


@dataclass(slots=True)
class Room:
    """One tenant's, while it uploads."""

    stored_bytes: int = 0
    """As the database said last, and what this gateway has added since."""
    arriving_bytes: int = 0
    uploads: int = 0


class Arrivals:
    def __init__(self) -> None:
        self._rooms: dict[str, Room] = {}

    def __len__(self) -> int:
        """Tenants who upload."""
        return len(self._rooms)

    def arrival(self, tenant: str, quota: Quota) -> Arrival:
        return Arrival(self._rooms, tenant, quota)


class Arrival:
    """One upload's bytes."""

    def __init__(self, rooms: dict[str, Room], tenant: str, quota: Quota) -> None:
        self._rooms = rooms
        self._tenant = tenant
        self._most_bytes = quota.stored_bytes
        self._bytes = 0
        self._room: Room | None = None

    def begin(self, stored_bytes: int, announced_bytes: int) -> None:
        """QuotaExceeded where what was announced cannot be kept."""
        self._room = room = self._rooms.setdefault(self._tenant, Room())
        room.uploads += 1
        room.stored_bytes = stored_bytes
        self._check(room, max(announced_bytes, 1))

    def add(self, size_bytes: int) -> None:
        """Before they are written."""
        assert self._room is not None
        self._check(self._room, size_bytes)
        self._room.arriving_bytes += size_bytes
        self._bytes += size_bytes

    def end(self, *, is_kept: bool) -> None:
        """Said again it is nothing new."""
        room, self._room = self._room, None
        if room is None:
            return
        room.arriving_bytes -= self._bytes
        room.stored_bytes += self._bytes if is_kept else 0
        room.uploads -= 1
        if not room.uploads:
            del self._rooms[self._tenant]

    def _check(self, room: Room, more_bytes: int) -> None:
        if room.stored_bytes + room.arriving_bytes + more_bytes > self._most_bytes:
            raise QuotaExceeded(f"this key may have {self._most_bytes} stored bytes at most")
