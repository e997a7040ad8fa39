"""What makes the pods of each role, and how many it is to make."""

from __future__ import annotations

from typing import Any, Protocol

from backends.kubernetes.api import AbsentError, Api
from policies.types import Role

GROUP_API = "workloads.x-k8s.io"
_GROUP_LABEL = "rolebasedgroup.workloads.x-k8s.io/name"
_ROLE_LABEL = "rolebasedgroup.workloads.x-k8s.io/role"


class Workloads(Protocol):
    async def selector(self, role: Role) -> str:
        """The labels of its pods."""
        ...

    async def replicas(self, role: Role) -> int: ...

    async def scale(self, role: Role, was: int, wanted: int) -> None:
        """ConflictError where it is not what it was."""
        ...

    def needs(self) -> list[tuple[str, str, str]]:
        """The verb, the API group and the resource of each right."""
        ...


class Deployments:
    """Two, one of each role."""

    def __init__(self, api: Api, names: dict[Role, str]) -> None:
        self._api = api
        self._names = names

    def _path(self, role: Role) -> str:
        return f"/apis/apps/v1/namespaces/{self._api.namespace}/deployments/{self._names[role]}"

    async def selector(self, role: Role) -> str:
        told = await self._api.get(self._path(role))
        labels = told.get("spec", {}).get("selector", {}).get("matchLabels", {})
        return ",".join(f"{name}={value}" for name, value in sorted(labels.items()))

    async def replicas(self, role: Role) -> int:
        scale = await self._api.get(f"{self._path(role)}/scale")
        return int(scale.get("spec", {}).get("replicas", 0))

    async def scale(self, role: Role, was: int, wanted: int) -> None:
        patch = _counted("/spec/replicas", was, wanted)
        await self._api.patch(f"{self._path(role)}/scale", patch)

    def needs(self) -> list[tuple[str, str, str]]:
        return [
            ("get", "apps", "deployments"),
            ("get", "apps", "deployments/scale"),
            ("patch", "apps", "deployments/scale"),
        ]


class Group:
    """One RoleBasedGroup with a role for each."""

    def __init__(self, api: Api, group: str, version: str, names: dict[Role, str]) -> None:
        self._api = api
        self._name = group
        self._names = names
        self._path = (
            f"/apis/{GROUP_API}/{version}/namespaces/{api.namespace}/rolebasedgroups/{group}"
        )

    async def selector(self, role: Role) -> str:
        return f"{_GROUP_LABEL}={self._name},{_ROLE_LABEL}={self._names[role]}"

    async def _role(self, role: Role) -> tuple[int, dict[str, Any]]:
        told = await self._api.get(self._path)
        for index, entry in enumerate(told.get("spec", {}).get("roles", [])):
            if entry.get("name") == self._names[role]:
                return index, entry
        raise AbsentError(f"the group {self._name} has no role {self._names[role]}")

    async def replicas(self, role: Role) -> int:
        _, entry = await self._role(role)
        return int(entry.get("replicas", 1))

    async def scale(self, role: Role, was: int, wanted: int) -> None:
        """The role's name is tested, too: roles may be put in another order."""
        index, entry = await self._role(role)
        path = f"/spec/roles/{index}"
        named = {"op": "test", "path": f"{path}/name", "value": entry["name"]}
        await self._api.patch(self._path, [named, *_counted(f"{path}/replicas", was, wanted)])

    def needs(self) -> list[tuple[str, str, str]]:
        return [(verb, GROUP_API, "rolebasedgroups") for verb in ("get", "patch")]


def _counted(path: str, was: int, wanted: int) -> list[dict[str, Any]]:
    """Only from what it was; a number of 0 is not written down, so that it cannot be tested."""
    test = [{"op": "test", "path": path, "value": was}] if was else []
    return [*test, {"op": "add", "path": path, "value": wanted}]
