"""Which pods are servers now: they come on the list when they are ready, and leave it with them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from backends.base import Roll
from backends.kubernetes.api import Api
from backends.kubernetes.pods import Pod, pod_of
from backends.kubernetes.workloads import Workloads
from policies.types import Pool, Role, Worker

ROLES = (Role.PREFILL, Role.DECODE)


class Presence:
    """The pods of both roles as they were listed last."""

    def __init__(
        self, api: Api, workloads: Workloads, roll: Roll, *, port: int, bootstrap_port: int
    ) -> None:
        self._api = api
        self._workloads = workloads
        self._roll = roll
        self._port = port
        self._bootstrap_port = bootstrap_port
        self._turnstile = asyncio.Lock()
        self._listed: dict[str, Worker] = {}
        self._kept: set[str] = set()
        self.pods: dict[str, Pod] = {}

    async def look(self) -> None:
        """Who is not ready any more stays: its probes say whether it serves."""
        async with self._turnstile:  # an older list must not come after a newer one
            await self._look()

    async def _look(self) -> None:
        found: dict[str, Pod] = {}
        for role in ROLES:
            selector = await self._workloads.selector(role)
            path = f"/api/v1/namespaces/{self._api.namespace}/pods"
            told = await self._api.get(path, labelSelector=selector)
            pods = (pod_of(item, role, Pool.STRICT) for item in told.get("items", []))
            found |= {pod.name: pod for pod in pods}
        self.pods = found
        for pod in found.values():
            if pod.serves:
                self._come(pod.worker(self._port, self._bootstrap_port))
        for name in sorted(self._listed.keys() - self._kept):
            if name not in found or found[name].leaving:
                self.drop(name)

    def _come(self, worker: Worker) -> None:
        """Between two looks a pod may come back under its name at another address."""
        if self._listed.get(worker.name) != worker:
            self._listed[worker.name] = worker
            self._roll.come(worker)

    def of(self, role: Role) -> list[Pod]:
        """Those that are not being ended."""
        return [it for it in self.pods.values() if it.role is role and not it.leaving]

    @contextmanager
    def keeping(self, name: str) -> Iterator[None]:
        """It is not taken off the list meanwhile, whatever becomes of its pod."""
        self._kept.add(name)
        try:
            yield
        finally:
            self._kept.discard(name)

    def drop(self, name: str) -> None:
        self._listed.pop(name, None)
        self._roll.leave(name)
