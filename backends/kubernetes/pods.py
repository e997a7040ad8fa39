"""A pod as far as it is a server: where it answers, whether it does, and who would end it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policies.types import Pool, Role, Worker

POOL_LABEL = "slackwater.io/pool"
COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
"""A ReplicaSet that is made smaller gives up the ready pod with the least cost first."""
HTTP_PORT, BOOTSTRAP_PORT = "http", "bootstrap"
"""How a container's ports are called where they are not those of the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    name: str
    role: Role
    ip: str = ""
    ready: bool = False
    leaving: bool = False
    """It is being ended, or has ended."""
    owner: str = ""
    """The kind of what made it."""
    pool: Pool = Pool.STRICT
    ports: Mapping[str, int]
    trouble: str = ""
    """Why a container of it waits."""

    @property
    def serves(self) -> bool:
        return self.ready and bool(self.ip) and not self.leaving

    @property
    def ordinal(self) -> int:
        """What a StatefulSet numbers it with; it gives up the highest first."""
        number = self.name.rpartition("-")[2]
        return int(number) if number.isdecimal() else -1

    def worker(self, port: int, bootstrap_port: int) -> Worker:
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return Worker(
            name=self.name,
            url=f"http://{host}:{self.ports.get(HTTP_PORT, port)}",
            role=self.role,
            pool=self.pool,
            bootstrap_host=host,
            bootstrap_port=self.ports.get(BOOTSTRAP_PORT, bootstrap_port),
        )


def pod_of(item: Mapping[str, Any], role: Role, default: Pool) -> Pod:
    meta, status = item.get("metadata", {}), item.get("status", {})
    conditions = {it.get("type"): it.get("status") for it in status.get("conditions", [])}
    owners = meta.get("ownerReferences") or [{}]
    pool = meta.get("labels", {}).get(POOL_LABEL, "")
    return Pod(
        name=str(meta["name"]),
        role=role,
        ip=str(status.get("podIP", "")),
        ready=conditions.get("Ready") == "True",
        leaving="deletionTimestamp" in meta or status.get("phase") in ("Succeeded", "Failed"),
        owner=str(owners[0].get("kind", "")),
        pool=Pool(pool) if pool in tuple(Pool) else default,
        ports=_ports(item),
        trouble=_trouble(status, conditions),
    )


def _ports(item: Mapping[str, Any]) -> dict[str, int]:
    containers = item.get("spec", {}).get("containers", [])
    ports = [port for container in containers for port in container.get("ports") or []]
    wanted = (HTTP_PORT, BOOTSTRAP_PORT)
    return {it["name"]: int(it["containerPort"]) for it in ports if it.get("name") in wanted}


def _trouble(status: Mapping[str, Any], conditions: Mapping[Any, Any]) -> str:
    """CrashLoopBackOff, ImagePullBackOff, and the like; or that there is no room for it."""
    for container in status.get("containerStatuses") or []:
        if reason := (container.get("state", {}).get("waiting") or {}).get("reason"):
            return str(reason)
    return "it is not scheduled" if conditions.get("PodScheduled") == "False" else ""
