"""What can be made to go wrong on one emulated server, and for how many requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any


class FaultKind(StrEnum):
    REFUSE = "refuse"
    """Reset the connection before any answer."""
    HANG = "hang"
    """Accept and never answer."""
    HANG_AFTER = "hang_after"
    DIE_AFTER = "die_after"
    """Cut the socket after some tokens."""
    ERROR_STATUS = "error_status"
    IN_BAND = "in_band"
    """An error inside the stream."""
    CORRUPT = "corrupt"
    """A chunk that is not JSON."""
    TRUNCATE = "truncate"
    """End the answer in good order, but without its last chunks."""
    SLOW = "slow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """With `requests`, for so many requests only; with `path`, for that path instead of all
    inference."""

    kind: FaultKind
    after_tokens: int = 0
    status: int = 503
    message: str = "injected fault"
    body: str | None = None
    factor: float = 10.0
    requests: int | None = None
    path: str | None = None


class Faults:
    """The faults of one server, the oldest that applies first."""

    def __init__(self) -> None:
        self._active: list[Fault] = []

    def __len__(self) -> int:
        return len(self._active)

    def add(self, fault: Fault) -> None:
        self._active.append(fault)

    def clear(self) -> None:
        self._active.clear()

    def take(self, path: str, *, inference: bool) -> Fault | None:
        """The fault that this request meets; slowness is not met by a request but by steps."""
        for position, fault in enumerate(self._active):
            applies = inference if fault.path is None else path == fault.path
            if not applies or fault.kind == FaultKind.SLOW:
                continue
            self._use_up(position)
            return fault
        return None

    def slowness(self) -> float:
        factor = 1.0
        for fault in self._active:
            if fault.kind == FaultKind.SLOW:
                factor *= fault.factor
        return factor

    def count_slow_request(self) -> None:
        """Slowness for so many requests is over when one more comes."""
        for position in reversed(range(len(self._active))):
            fault = self._active[position]
            if fault.kind == FaultKind.SLOW and fault.requests is not None:
                if fault.requests == 0:
                    del self._active[position]
                else:
                    self._active[position] = replace(fault, requests=fault.requests - 1)

    def _use_up(self, position: int) -> None:
        fault = self._active[position]
        if fault.requests is None:
            return
        if fault.requests <= 1:
            del self._active[position]
        else:
            self._active[position] = replace(fault, requests=fault.requests - 1)


def read_fault(body: Mapping[str, Any]) -> Fault:
    """From JSON; an unknown key or kind is a ValueError that names what is known."""
    known = {field.name for field in fields(Fault)}
    unknown = sorted(set(body) - known)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}, expected some of {sorted(known)}")
    kinds = [kind.value for kind in FaultKind]
    if body.get("kind") not in kinds:
        raise ValueError(f"kind must be one of {kinds}")
    return Fault(**{**body, "kind": FaultKind(body["kind"])})
