"""Who of several gateways changes the servers of a namespace: the holder of one Lease object.

A holder is believed as long as its record changes: no clock is compared with another machine's.
What is written beside the holder is the change that is under way, so that whoever comes after a
gateway that has died in the middle of one can finish it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from backends.kubernetes.api import AbsentError, Api, ConflictError
from policies.clock import Clock

PLAN_ANNOTATION = "slackwater.io/change"
SECONDS = 30
"""A record that has not changed for so long is nobody's."""


@dataclass(frozen=True, slots=True)
class _Record:
    version: str = ""
    holder: str = ""
    plan: str = ""
    seconds: int = SECONDS


class Lease:
    """Taken with the first change, and kept until the gateway ends: one hand at a time."""

    def __init__(self, api: Api, name: str, us: str, clock: Clock) -> None:
        self._api = api
        self._name = name
        self._us = us
        self._clock = clock
        self._turnstile = asyncio.Lock()
        self._record = _Record()
        self._changed_s = clock.time()
        """When the record was seen to be another one."""
        self.is_held = False

    @property
    def _path(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{self._api.namespace}/leases"

    @property
    def holder(self) -> str:
        return self._record.holder

    @property
    def is_anothers(self) -> bool:
        """As of the last look."""
        return not self.is_held and not self._is_free

    @property
    def plan(self) -> str:
        """What was under way when the record was written."""
        return self._record.plan

    async def look(self) -> None:
        """To be called again and again: renews what we hold, and sees whether others do."""
        async with self._turnstile:
            await self._read()
            if self.is_held:
                await self._write(self._record.plan)

    async def take(self) -> bool:
        """Whether it is ours; the plan of whoever had it before stays until it is written over."""
        async with self._turnstile:
            await self._read()
            if not self.is_held and self._is_free:
                await self._write(self._record.plan)
            return self.is_held

    async def note(self, plan: str) -> None:
        """ConflictError where somebody else has it by now."""
        async with self._turnstile:
            is_ours = await self._write(plan)
        if not is_ours:
            raise ConflictError("the lease was taken by somebody else")

    async def give_up(self) -> None:
        async with self._turnstile:
            if self.is_held:
                await self._write(self._record.plan, holder="")

    @property
    def _is_free(self) -> bool:
        record = self._record
        stale_s = self._clock.time() - self._changed_s
        return record.holder in ("", self._us) or stale_s > record.seconds

    async def _read(self) -> None:
        try:
            record = _record(await self._api.get(f"{self._path}/{self._name}"))
        except AbsentError:
            record = _Record()
        self._saw(record)

    def _saw(self, record: _Record) -> None:
        if record != self._record:
            self._record, self._changed_s = record, self._clock.time()
        if record.holder != self._us:
            self.is_held = False

    async def _write(self, plan: str, holder: str | None = None) -> bool:
        """Whether nobody else was faster."""
        record = replace(self._record, plan=plan, holder=self._us if holder is None else holder)
        body = _object(self._name, record)
        try:
            if record.version:
                told = await self._api.call("PUT", f"{self._path}/{self._name}", body)
            else:
                told = await self._api.call("POST", self._path, body)
        except ConflictError:
            self.is_held = False
            return False
        self._saw(_record(told))
        self.is_held = self._record.holder == self._us
        return self.is_held


def _record(told: dict[str, Any]) -> _Record:
    meta, spec = told.get("metadata", {}), told.get("spec", {})
    return _Record(
        version=str(meta.get("resourceVersion", "")),
        holder=str(spec.get("holderIdentity") or ""),
        plan=str((meta.get("annotations") or {}).get(PLAN_ANNOTATION, "")),
        seconds=int(spec.get("leaseDurationSeconds") or SECONDS),
    )


def _object(name: str, record: _Record) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, "annotations": {PLAN_ANNOTATION: record.plan}}
    if record.version:
        meta["resourceVersion"] = record.version
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": meta,
        "spec": {
            "holderIdentity": record.holder,
            "leaseDurationSeconds": SECONDS,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        },
    }
